"""LoRA of a scoring batch on the CPU: SGLang's torch_native calls through `SegmentedLora`.

SGLang's own code runs each adapter's tokens, and each piece of a fused module, through products of
their own, in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from mezo.engines.sglang.batch.patch import patched
from mezo_kernels import SegmentedLora

if TYPE_CHECKING:
    from sglang.srt.lora.backend.base_backend import BaseLoRABackend

# The calls of SGLang's LoRA backends.
LORA_CALLS = ("run_lora_a_sgemm", "run_lora_b_sgemm", "run_qkv_lora", "run_gate_up_lora")


@contextmanager
def segmented_lora(backend: BaseLoRABackend) -> Iterator[None]:
    """Let a torch_native LoRA backend run the next batch through `SegmentedLora`, if it can."""
    lora = _lora_of(backend)
    if lora is None:
        yield
        return
    calls = LoraCalls(lora)
    with ExitStack() as stack:
        for name in LORA_CALLS:
            stack.enter_context(patched(backend, name, getattr(calls, name)))
        yield


def _lora_of(backend: BaseLoRABackend) -> SegmentedLora | None:
    """The segments of the batch that a backend is ready for; None where ranks differ."""
    info = backend.batch_info
    if backend.name != "torch_native" or info is None or info.seg_lens.device.type != "cpu":
        return None
    slots = info.weight_indices_cpu.tolist()
    rank_of, scaling_of = info.lora_ranks_cpu.tolist(), info.scalings_cpu.tolist()
    ranks = {rank_of[slot] for slot in slots} - {0}
    if len(ranks) != 1:
        return None
    return SegmentedLora(
        info.seg_indptr_cpu.tolist(),
        [slot if rank_of[slot] else None for slot in slots],
        [scaling_of[slot] for slot in slots],
        ranks.pop(),
    )


class LoraCalls:
    """The calls of a LoRA backend, for one batch."""

    def __init__(self, lora: SegmentedLora) -> None:
        self._lora = lora

    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: torch.Tensor, stack_num: int = 1, *_: object, **__: object
    ) -> torch.Tensor:
        """`[T, D_in]` -> `[T, stack_num * rank]`, scaled."""
        return self._lora.shrink(x, weights, stack_num)

    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        output_offset: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor | None = None,
        *_: object,
        **__: object,
    ) -> torch.Tensor:
        """`[T, slices * rank]` -> `[T, D_out]`, added to ``base_output``."""
        offsets = output_offset_cpu.tolist()
        out = x.new_zeros(len(x), offsets[-1]) if base_output is None else base_output
        self._lora.expand_(out, x, weights, offsets)
        return out

    def run_qkv_lora(
        self,
        x: torch.Tensor,
        qkv_lora_a: torch.Tensor,
        qkv_lora_b: torch.Tensor,
        output_offset: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        *_: object,
        base_output: torch.Tensor | None = None,
        **__: object,
    ) -> torch.Tensor:
        """Both factors of a stacked module."""
        h = self._lora.shrink(x, qkv_lora_a, len(output_offset_cpu) - 1)
        return self.run_lora_b_sgemm(h, qkv_lora_b, output_offset, output_offset_cpu, base_output)

    def run_gate_up_lora(
        self,
        x: torch.Tensor,
        gate_up_lora_a: torch.Tensor,
        gate_up_lora_b: torch.Tensor,
        output_offset: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor | None = None,
        **__: object,
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
