"""LoRA of a scoring batch on the CPU: all adapters in one product, where their parts are alike.

SGLang's torch_native LoRA backend runs each adapter's part of the batch on its own, in Python. In a
scoring batch every adapter has the same rows, so that the parts are as long as each other and one
batched product does them all: half the operations for a pair, and fewer the more directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mezo.sglang.replaced import replaced

# The calls of SGLang's LoRA backends.
LORA_CALLS = ("run_lora_a_sgemm", "run_lora_b_sgemm", "run_qkv_lora", "run_gate_up_lora")


@contextmanager
def paired_lora(backend: Any) -> Iterator[None]:
    """Let a torch_native LoRA backend run the next batch as one product, if its parts are alike."""
    parts = _equal_parts(backend)
    if parts is None:
        yield
        return
    paired = PairedLora(*parts)
    with ExitStack() as stack:
        for name in LORA_CALLS:
            stack.enter_context(replaced(backend, name, getattr(paired, name)))
        yield


def _equal_parts(backend: Any) -> tuple[list[int], int, float] | None:
    """(adapter slots, rank, scaling) of a batch of equally long parts, else None."""
    info = backend.batch_info
    if backend.name != "torch_native" or info is None or info.seg_lens.device.type != "cpu":
        return None
    slots: list[int] = info.weight_indices_cpu.tolist()
    ranks = info.lora_ranks_cpu[slots].unique().tolist()
    scalings = info.scalings_cpu[slots].unique().tolist()
    lengths = info.seg_lens_cpu.unique().tolist()
    if len(slots) < 2 or len(ranks) > 1 or len(scalings) > 1 or len(lengths) > 1 or not ranks[0]:
        return None
    return slots, ranks[0], scalings[0]


class PairedLora:
    """The calls of a LoRA backend for a batch whose adapters have equally long parts."""

    def __init__(self, slots: list[int], rank: int, scaling: float) -> None:
        self._slots = _as_slice(slots)
        self._count = len(slots)
        self._rank = rank
        self._scaling = scaling

    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: torch.Tensor, stack_num: int = 1, *_: Any, **__: Any
    ) -> torch.Tensor:
        """`[T, D_in]` -> `[T, stack_num * rank]`, scaled."""
        parts = x.view(self._count, -1, x.shape[-1])
        factor = weights[self._slots][:, : stack_num * self._rank].transpose(1, 2)
        out = x.new_empty(*parts.shape[:2], stack_num * self._rank)
        return torch.baddbmm(out, parts, factor, beta=0, alpha=self._scaling).view(len(x), -1)

    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        output_offset: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """`[T, slices * rank]` -> `[T, D_out]`, added to ``base_output``."""
        ends = output_offset_cpu.tolist()
        out = x.new_zeros(len(x), ends[-1]) if base_output is None else base_output
        parts, into = x.view(self._count, -1, x.shape[-1]), out.view(self._count, -1, ends[-1])
        factor = weights[self._slots][:, :, : self._rank].transpose(1, 2)
        for k, (start, end) in enumerate(itertools.pairwise(ends)):
            own = parts[:, :, k * self._rank : (k + 1) * self._rank]
            into[:, :, start:end].baddbmm_(own, factor[:, :, start:end])
        return out

    def run_qkv_lora(
        self,
        x: torch.Tensor,
        qkv_lora_a: torch.Tensor,
        qkv_lora_b: torch.Tensor,
        output_offset: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        *_: Any,
        base_output: torch.Tensor | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Both factors of a stacked module."""
        shrunk = self.run_lora_a_sgemm(x, qkv_lora_a, len(output_offset_cpu) - 1)
        return self.run_lora_b_sgemm(
            shrunk, qkv_lora_b, output_offset, output_offset_cpu, base_output
        )

    def run_gate_up_lora(
        self,
        x: torch.Tensor,
        gate_up_lora_a: torch.Tensor,
        gate_up_lora_b: torch.Tensor,
        output_offset: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Both factors of gate and up."""
        return self.run_qkv_lora(
            x,
            gate_up_lora_a,
            gate_up_lora_b,
            output_offset,
            output_offset_cpu,
            base_output=base_output,
        )


def _as_slice(slots: list[int]) -> slice | list[int]:
    """The slots as a slice, which copies nothing, where they are evenly spaced upwards."""
    step = slots[1] - slots[0]
    if step > 0 and slots == list(range(slots[0], slots[-1] + 1, step)):
        return slice(slots[0], slots[-1] + 1, step)
    return slots
