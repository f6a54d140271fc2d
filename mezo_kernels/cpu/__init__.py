"""Helpers for engines on hosts without a GPU: LoRA by segments, norm, rotary, gated activation."""

from mezo_kernels.cpu.layers import rms_norm, rotary, silu_and_mul
from mezo_kernels.cpu.lora import SegmentedLora

__all__ = ["SegmentedLora", "rms_norm", "rotary", "silu_and_mul"]
