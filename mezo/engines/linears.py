"""The linear layers of a checkpoint as Hugging Face names them, read off its config only.

PEFT finds an adapter's tensors by the names of the Hugging Face model. SGLang has layers of its own
(one qkv_proj where the checkpoint has three, or the other way round), so what is trained there is
compared with the Hugging Face class, built on torch's meta device: names and shapes, no weights.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from mezo._inputs import one_line


@dataclasses.dataclass(frozen=True)
class ModelLinears:
    """What a Hugging Face class has of linear layers.

    Args:
        model_class: name of the class.
        shapes: {name of a linear layer: (output features, input features)}.
        num_parameters: parameters of the whole model.
    """

    model_class: str
    shapes: Mapping[str, tuple[int, int]]
    num_parameters: int

    def siblings(self, name: str) -> list[str]:
        """Last components of the linear layers beside ``name``, or of all decoder layers."""
        parent = name.rpartition(".")[0] + "."
        beside = {n.removeprefix(parent) for n in self.shapes if n.startswith(parent)}
        return sorted(beside) or sorted({leaf(n) for n in self.shapes if ".0." in n})


def leaf(name: str) -> str:
    """The last component of a module's name."""
    return name.rpartition(".")[2]


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """(Output, input) features of a linear layer that PEFT adapts by two matrices, or None."""
    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Linear):
        return int(module.out_features), int(module.in_features)
    if type(module).__name__ == "Conv1D" and weight is not None:  # transformers' transposed linear
        return int(weight.shape[1]), int(weight.shape[0])
    return None


def linears_of(config: Any) -> ModelLinears | str:
    """Read a checkpoint's linear layers off its config.

    Args:
        config: a Hugging Face ``PretrainedConfig``.

    Returns:
        The layers, or why they cannot be known (one clause): a model with code of its own.
    """
    import transformers

    name = str((getattr(config, "architectures", None) or ["a model without architectures"])[0])
    cls = getattr(transformers, name, None)
    if cls is None or not isinstance(config, getattr(cls, "config_class", None) or ()):
        return f"transformers has no class {name} for {type(config).__name__}"
    try:
        with torch.device("meta"):
            model = cls._from_config(copy.deepcopy(config))
    except Exception as error:  # a class that cannot be built says nothing about the adapter
        return f"transformers could not build {name} ({type(error).__name__}: {error})"
    shapes = {n: linear_shape(m) for n, m in model.named_modules()}
    return ModelLinears(
        name,
        {n: shape for n, shape in shapes.items() if shape is not None},
        sum(p.numel() for p in model.parameters()),
    )


def check_names(
    tensors: Iterable[tuple[str, Sequence[int]]], linears: ModelLinears, rank: int
) -> None:
    """Raise unless PEFT finds every adapter tensor in the Hugging Face model.

    Args:
        tensors: (canonical name, whole shape) of the adapter's tensors.
        linears: from `linears_of`.
        rank: the adapter's rank.

    Raises:
        ValueError: a name that the model does not have as a linear layer, or another shape.
    """
    wanted = dict(tensors)
    missing = sorted({n.rpartition(".")[0] for n in wanted} - set(linears.shapes))
    if missing:
        raise ValueError(_missing(missing, linears))
    for tensor, shape in wanted.items():
        name, _, factor = tensor.rpartition(".")
        rows, columns = linears.shapes[name]
        expected = (rank, columns) if factor == "lora_A" else (rows, rank)
        if tuple(shape) != expected:
            raise ValueError(
                f"attach: {tensor} must have the shape {expected} of {linears.model_class}'s layer "
                f"of that name, got {tuple(shape)} from the engine's; train other target_modules, "
                "or attach the transformers model (engine='transformers')."
            )


def _missing(missing: Sequence[str], linears: ModelLinears) -> str:
    """What to say about layers that Hugging Face's model does not have."""
    first = missing[0]
    wrong = sorted({leaf(name) for name in missing})
    beside = linears.siblings(first)
    same = [n for n in linears.shapes if leaf(n) == leaf(first)]
    if same:
        place = difflib.get_close_matches(first, same, n=1, cutoff=0.0)[0]
        what = f"which lie elsewhere there ({place!r} for {first!r})"
    else:
        what = f"where the layers beside {first!r} are called {beside}"
    choice = _instead(wrong, beside)
    return (
        f"attach: target_modules must be linear layers of {linears.model_class} as Hugging Face "
        f"and PEFT name them, got {wrong}, {what}; "
        + (f"use {choice} in their place, " if choice and not same else "use other ones, ")
        + "or attach the transformers model (engine='transformers')."
    )


def _instead(wrong: Sequence[str], beside: Sequence[str]) -> list[str]:
    """The layers that hold the wrong ones, or that they hold; by how their names are made."""
    chosen: list[str] = []
    for name in wrong:
        for stacked, pieces in STACKED.items():
            if name in pieces and stacked in beside:
                chosen.append(stacked)
            elif name == stacked:
                chosen += [piece for piece in pieces if piece in beside]
    return list(dict.fromkeys(chosen))


# Layers that SGLang stacks, with their pieces; some checkpoints have them stacked, too.
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def all_linear(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[str, ...]:
    """Return the names of all linear layers inside a model's decoder layers: PEFT's "all-linear".

    Args:
        model: directory or hub name; only its config is read.
        revision: of a hub model.
        trust_remote_code: whether the repository may run code of its own.

    Raises:
        ValueError: there is no such model, or its layers are not known.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        words = one_line(error)[:200]
        raise ValueError(
            f"train: model must be a directory or a hub name, got {model!r} ({words}); check it."
        ) from error
    found = linears_of(config)
    if isinstance(found, str):
        raise ValueError(
            f"train: target_modules all-linear must be found in the model's class, got {found}; "
            "name the modules."
        )
    return tuple(dict.fromkeys(leaf(name) for name in found.shapes if ".0." in name))
