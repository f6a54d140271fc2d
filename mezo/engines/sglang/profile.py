"""A step's time by part: a stopwatch around SGLang's own parts, for benchmarks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

from mezo.engines.sglang.batch import logprobs
from mezo.engines.sglang.batch.attention import PairedAttention
from mezo.engines.sglang.batch.cpu_layers import CpuLayers
from mezo.engines.sglang.batch.cpu_lora import LORA_CALLS, LoraCalls
from mezo.engines.sglang.batch.patch import patched
from mezo.engines.sglang.compat import Rank

P = ParamSpec("P")
T = TypeVar("T")


class Stopwatch:
    """Seconds spent in named parts, each without the parts inside it.

    Args:
        device: where the parts run; an accelerator is waited for at every border, which keeps the
            parts apart and makes the whole slower than it is without the watch.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._is_accelerated = torch.device(device).type != "cpu"
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``'s."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Give the time since the last border to the innermost open part."""
        if self._is_accelerated:
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


@contextmanager
def watched(rank: Rank, watch: Stopwatch) -> Iterator[None]:
    """Count the time of attention, linear layers, LoRA, lm_head and the rest of the model.

    "layers" is what is left of the model's own forward: norms, rotary embedding, activations,
    embedding, and Python between them. In a graph that is replayed linear layers and LoRA belong to
    it, too, and have no time of their own.
    """
    runner = rank.runner
    linears = {
        type(method)
        for module in rank.model.modules()
        if (method := getattr(module, "quant_method", None)) is not None
        and hasattr(module, "output_size")
    }
    calls: list[tuple[object, str, str]] = [(rank.model, "forward", "layers")]
    calls += [(owner, "forward", "attention") for owner in (runner.attn_backend, PairedAttention)]
    calls += [(kind, "apply", "linear") for kind in linears]
    calls.append((CpuLayers, "linear", "linear"))
    for owner in (runner.lora_manager.lora_backend, LoraCalls):
        calls += [(owner, name, "lora") for name in LORA_CALLS]
    calls.append((logprobs.LogprobProcessor, "forward", "lm_head"))
    with ExitStack() as stack:
        for owner, name, part in calls:
            timed = _timed(getattr(owner, name), watch, part)
            stack.enter_context(patched(owner, name, timed))
        yield


def _timed(call: Callable[P, T], watch: Stopwatch, part: str) -> Callable[P, T]:
    """The call, with its time counted."""

    def timed(*args: P.args, **kwargs: P.kwargs) -> T:
        with watch.part(part):
            return call(*args, **kwargs)

    return timed
