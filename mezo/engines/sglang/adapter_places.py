"""Where an adapter's tensors belong in SGLang's model, by PEFT's module names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mezo.engines.linears import STACKED
from mezo.engines.sglang.lora_slots import piece_sizes

if TYPE_CHECKING:
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

# What may come before "layers.N." in a language model's module names. SGLang reads only what
# comes after it, so that a vision tower's tensors would land in the language model.
_TRUNKS = frozenset({"model", "language_model", "text_model", "decoder", "transformer"})


@dataclass(frozen=True)
class Place:
    """A layer that an adapter changes.

    Args:
        path: PEFT's name of the layer.
        module: SGLang's name of the (fused) module in its LoRA pool.
        d_in: input features.
        d_out: output features of this layer, across all ranks.
        neighbours: output features of the other layers that SGLang fuses with it.
        base: SGLang's layer.
    """

    path: str
    module: str
    d_in: int
    d_out: int
    neighbours: dict[str, int] = field(default_factory=dict)
    base: LinearBase | VocabParallelEmbedding = None

    def equals_base(self, tensor: torch.Tensor) -> bool:
        """Whether an embedding's or lm_head's weights are the engine's, on this rank."""
        shard = self.base.shard_indices
        start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        ours = self.base.weight[: end - start]
        if tuple(tensor.shape) != (self.base.org_vocab_size, ours.shape[1]):
            return False
        return torch.equal(ours, tensor[start:end].to(ours.device, ours.dtype))


class Places:
    """The layers of SGLang's model by PEFT's names.

    Args:
        model: SGLang's model, with or without its LoRA layers around the linear ones.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # A LoRA layer replaces its base layer in the model.
        self._modules = {
            name: getattr(module, "base_layer", module) for name, module in model.named_modules()
        }
        self._by_tail: dict[str, str] = {}
        for name in self._modules:
            trunk, tail = _split(name)
            if tail and trunk <= _TRUNKS:
                self._by_tail.setdefault(tail, name)

    def find(self, path: str) -> Place | None:
        """Return the place of a PEFT module; None if it is on another pipeline stage.

        Raises:
            LookupError: the model has no such layer, or not as one that can be checked; its text
                is the rest of a sentence about the tensor.
        """
        leaf = path.rpartition(".")[2]
        if leaf in ("embed_tokens", "lm_head"):
            return self._embedding(path, leaf)
        for module, pieces in _stacks(leaf):
            name = path.removesuffix(leaf) + module
            trunk, tail = _split(name)
            if trunk <= _TRUNKS and tail in self._by_tail:
                known = name if name in self._modules else self._by_tail[tail]
                return _linear(path, module, pieces, self._modules[known])
        if self._is_elsewhere(path):
            return None
        raise LookupError(
            "must be of a linear layer of the engine's language model, got none of that name; load "
            "an adapter of this model"
        )

    def _embedding(self, path: str, leaf: str) -> Place | None:
        """The embedding or lm_head; the latter may be the former."""
        names = [n for n in self._modules if n.rpartition(".")[2] == leaf]
        base = next(
            (self._modules[n] for n in names if hasattr(self._modules[n], "org_vocab_size")), None
        )
        if base is None:
            if any(_is_missing(self._modules[n]) for n in names):
                return None
            raise LookupError(f"must be of a layer of the engine's model, got no {leaf} there")
        vocab, dim = int(base.org_vocab_size), int(base.embedding_dim)
        d_in, d_out = (vocab, dim) if leaf == "embed_tokens" else (dim, vocab)
        return Place(path, leaf, d_in, d_out, base=base)

    def _is_elsewhere(self, path: str) -> bool:
        """Whether a module's layer is a placeholder for one of another pipeline stage."""
        layer = re.match(r"(.*\blayers\.\d+)\.", path)
        return layer is not None and _is_missing(self._modules.get(layer[1]))


def _is_missing(module: torch.nn.Module | None) -> bool:
    return type(module).__name__ == "PPMissingLayer"


def _split(name: str) -> tuple[frozenset[str], str]:
    """What comes before "layers.N." in a name, and the name from there on."""
    match = re.match(r"(.*?)\b(layers\.\d+\..*)", name)
    if match is None:
        return frozenset(), ""
    return frozenset(filter(None, match[1].split("."))), match[2]


def _stacks(leaf: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """SGLang's modules that may hold a layer, and the layers that each is fused of."""
    yield leaf, (leaf,)
    for module, pieces in STACKED.items():
        if leaf in pieces:
            yield module, pieces


def _linear(path: str, module: str, pieces: tuple[str, ...], base: LinearBase) -> Place:
    """A (fused) linear layer."""
    try:
        if pieces == (module,) and module in STACKED:
            sizes = [sum(piece_sizes(base, len(STACKED[module])))]
        else:
            sizes = piece_sizes(base, len(pieces))
        d_in = int(base.input_size)
    except AttributeError:
        raise LookupError(
            f"must be of a plain linear layer, got {type(base).__name__}, which is not compared "
            "with PEFT yet; set MEZO_CHECK_ADAPTERS=0 to leave ordinary adapters to SGLang"
        ) from None
    leaf = path.rpartition(".")[2]
    by_piece = dict(zip(pieces, sizes, strict=True))
    d_out = by_piece.pop(leaf)
    return Place(path, module, d_in, d_out, by_piece, base)
