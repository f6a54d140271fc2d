"""Kernels that show single device functions of z; imported only where triton may be."""

import torch
import triton
import triton.language as tl

from mezo_kernels.directions.triton.philox import box_muller, fma, sqrt_of_radius


@triton.jit
def box_muller_kernel(words_ptr, z_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    radius = tl.load(words_ptr + 2 * offs).to(tl.uint32)
    angle = tl.load(words_ptr + 2 * offs + 1).to(tl.uint32)
    even, odd = box_muller(radius, angle)
    tl.store(z_ptr + 2 * offs, even)
    tl.store(z_ptr + 2 * offs + 1, odd)


@triton.jit
def sqrt_kernel(x_ptr, root_ptr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(root_ptr + offs, tl.sqrt_rn(x) if EXACT else sqrt_of_radius(x))


@triton.jit
def fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c = tl.load(a_ptr + offs), tl.load(b_ptr + offs), tl.load(c_ptr + offs)
    tl.store(out_ptr + offs, fma(a, b, c))


def fma_of(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, block: int = 2048) -> torch.Tensor:
    """`a * b + c` of `[N]` fp32, N a multiple of the block."""
    out = torch.empty_like(a)
    fma_kernel[(len(a) // block,)](a, b, c, out, BLOCK=block, enable_fp_fusion=False)
    return out


def box_muller_of_words(words: torch.Tensor, device: str, block: int = 2048) -> torch.Tensor:
    """The two normals of each row of `[N, 2]` words, `[N, 2]` fp32."""
    count = -(-len(words) // block) * block
    padded = torch.zeros(count, 2, dtype=torch.int64)
    padded[: len(words)] = words
    z = torch.empty(count, 2, device=device)
    box_muller_kernel[(count // block,)](padded.to(device), z, BLOCK=block, enable_fp_fusion=False)
    return z[: len(words)]


def sqrt_of(x: torch.Tensor, *, exact: bool, block: int = 1024) -> torch.Tensor:
    """Square roots of `[N]` fp32, N a multiple of the block."""
    root = torch.empty_like(x)
    sqrt_kernel[(len(x) // block,)](x, root, BLOCK=block, EXACT=exact, enable_fp_fusion=False)
    return root
