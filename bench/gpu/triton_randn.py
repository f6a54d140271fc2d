"""The stock Triton kernel that bench/baselines.py compares with."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _add_randn_kernel(data_ptr, scale, seed, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    values = tl.load(data_ptr + offs, mask=mask)
    values += scale * tl.randn(seed, offs)
    tl.store(data_ptr + offs, values, mask=mask)


def add_randn(tensor: torch.Tensor, scale: float, seed: int = 1) -> None:
    """tensor += scale * tl.randn(seed, index), in place."""
    grid = (triton.cdiv(tensor.numel(), BLOCK),)
    _add_randn_kernel[grid](tensor, scale, seed, tensor.numel(), BLOCK=BLOCK)
