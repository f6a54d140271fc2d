"""Which prefill CUDA graphs a training engine captures: few, of the sizes that its steps have.

SGLang captures some fifty sizes, up to its largest chunk, which takes it half a minute. A batch
replays the next larger size, but not one of more than twice its tokens. With the LoRA backend
"triton" SGLang 0.5.17 replays batches of at most 32 sequences; with its default, "csgmv", any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mezo._inputs import checked_integer
from mezo.config import MeZOConfig
from mezo.engines.sglang.batch.prefill_graph import BREAKABLE
from mezo.engines.sglang.sizing import PREFILL_TOKENS, copies_of

# Where steps are not known. A larger batch keeps a GPU busy for as long as its launches take, and
# filling it up would cost GPU time.
_MOST, _LEAST = 512, 16
_MULTIPLE = 8  # so that rows of a tile that a product computes anyway are not left out

# What a user says about sizes, or against graphs.
_SAID = (
    "cuda_graph_bs_prefill",
    "cuda_graph_max_bs_prefill",
    "disable_cuda_graph",
    "disable_prefill_cuda_graph",
)
# The LoRA backends of SGLang that no graph can hold.
_NOT_IN_GRAPHS = ("torch_native", "ascend")


def graph_sizes(step_tokens: Sequence[int], limit: int) -> list[int]:
    """Sizes of graphs for batches of ``min(step_tokens)`` to ``max(step_tokens)`` tokens.

    They halve from the largest down, so that no batch between them is filled up to more than twice
    its tokens.

    Args:
        step_tokens: tokens of the steps' batches, at least one.
        limit: tokens that no batch exceeds.

    Returns:
        The sizes, rising.
    """
    least, most = (min(bound(step_tokens), limit) for bound in (min, max))
    sizes = [min(_filled(most), limit)]
    while sizes[-1] > 2 * least and sizes[-1] > _MULTIPLE:
        sizes.append(_filled(-(-sizes[-1] // 2)))
    return sizes[::-1]


def default_step_tokens(config: MeZOConfig) -> tuple[int, int]:
    """The least and the most tokens of the batches that graphs are for where nothing is known."""
    copies = copies_of(config)
    return max(_LEAST, copies), max(_MOST, 8 * copies)


def checked_step_tokens(step_tokens: object) -> tuple[int, ...] | None:
    """The tokens of steps as numbers, or None where none are given.

    Raises:
        ValueError: no positive integer, and no list of some.
    """
    if step_tokens is None:
        return None
    given = step_tokens if isinstance(step_tokens, list | tuple) else (step_tokens,)
    what, expected = "launch_engine: step_tokens", "an integer >= 1, or a list of some"
    remedy = "pass tokens - prompt_tokens of a StepResult, or leave it out"
    numbers = [checked_integer(what, n, 1, None, expected, remedy) for n in given or (None,)]
    return tuple(numbers)


def graph_arguments(
    args: Mapping[str, Any], config: MeZOConfig, step_tokens: Sequence[int] | None
) -> dict[str, list[int]]:
    """What to add to an engine's arguments so that its steps replay graphs.

    The kind of the graphs is not added: SGLang chooses the breakable one itself on NVIDIA's GPUs,
    and no graphs where the model or the memory has no room for them.

    Args:
        args: the engine's arguments so far; what they say about sizes stays, and holds.
        config: the run.
        step_tokens: tokens of its steps' batches, or None where that is not known.

    Raises:
        NotImplementedError: graphs that were asked for and that steps cannot replay.
    """
    check_graphs(args)
    prefill = _prefill(args)
    said = any(args.get(name) for name in _SAID) or prefill.keys() & {"bs", "max_bs"}
    if said or _backend(args) == "disabled":
        return {}
    limit = int(args.get("max_prefill_tokens") or PREFILL_TOKENS)
    sizes = graph_sizes(step_tokens or default_step_tokens(config), limit)
    return {"cuda_graph_bs_prefill": sizes}


def check_graphs(args: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for graphs that were asked for and that steps cannot replay."""
    backend, lora = _backend(args), args.get("lora_backend")
    if backend not in (None, BREAKABLE, "disabled"):
        raise NotImplementedError(
            f"launch_engine: cuda_graph_backend_prefill must be {BREAKABLE!r} or 'disabled', the "
            f"other graphs hold SGLang's own attention or logits, got {backend!r}; leave it out."
        )
    if backend == BREAKABLE and lora in _NOT_IN_GRAPHS:
        raise NotImplementedError(
            f"launch_engine: lora_backend must be one that SGLang can capture in prefill graphs, "
            f"got {lora!r} with cuda_graph_backend_prefill={BREAKABLE!r}; leave one of them out."
        )


def has_breakable_graphs(args: Mapping[str, Any]) -> bool:
    """Whether an engine with these arguments runs where SGLang has breakable graphs."""
    on_cuda = torch.version.cuda is not None and torch.cuda.is_available()
    return on_cuda and args.get("device") in (None, "cuda")


def _backend(args: Mapping[str, Any]) -> object:
    """The kind of prefill graphs that was asked for."""
    return _prefill(args).get("backend") or args.get("cuda_graph_backend_prefill")


def _prefill(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the argument that says everything about graphs says about those of prefill."""
    config: Any = args.get("cuda_graph_config") or {}
    phases = config if isinstance(config, Mapping) else config.to_dict()
    return phases.get("prefill") or {}


def _filled(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE
