"""The triton backend: tiles of rows, each of which makes its factors, in three launches.

Tiles and the order of sums follow from shapes and dtype: the number of rows decides only how many
programs there are.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

from bench.experiments.lora.call import DeviceCall, LoraCall
from bench.experiments.lora.triton.kernel import expand_kernel, finish_kernel, shrink_kernel
from mezo_kernels.directions.philox import TensorSpec
from mezo_kernels.directions.triton.kernel import MIXED

# Columns of x that one program adds up.
SPLIT_K = 256
FINISH_BLOCK = 1024


def shrink_tiles(dtype: torch.dtype, rank: int, is_even: bool) -> dict[str, int]:
    """Tile sizes and launch options of the first half; even: aligned, and a multiple of 16."""
    is_small = dtype == torch.float32 or not is_even
    block_r = _block_r(is_small, rank, 8)
    block_k = max(16, min(32 if is_small else 64, 2048 // block_r))
    return {"BLOCK_R": block_r, "BLOCK_K": block_k, "SPLIT_K": SPLIT_K, **_options(is_small)}


def expand_tiles(dtype: torch.dtype, rank: int, is_even: bool) -> dict[str, int]:
    """Tile sizes and launch options of the second half."""
    is_small = dtype == torch.float32 or not is_even
    block_r = _block_r(is_small, rank, 4)
    # A product is at least 16 deep.
    pads = max(0, 5 - block_r.bit_length())
    block_n = 32 if is_small else 64
    return {"BLOCK_N": block_n, "BLOCK_R": block_r, "PADS": pads, **_options(is_small)}


# IEEE products run on the CUDA cores, with both operands in registers; addresses of single elements
# and a Philox call for each need registers, too.
def _block_r(is_small: bool, rank: int, least: int) -> int:
    return min(16 if is_small else 64, max(least, 1 << (rank - 1).bit_length()))


def _options(is_small: bool) -> dict[str, int]:
    return {"BLOCK_M": 32 if is_small else 64, "num_warps": 4, "num_stages": 2}


def perturbed_lora(call: LoraCall) -> None:
    """Write the result of a call."""
    run(call.on_device())


def run(sent: DeviceCall) -> None:
    """Launch the kernels of a call whose tables are on the device; can be captured."""
    call = sent.call
    x, a, b, y = call.x, call.a, call.b, call.y
    (T, D), R = x.shape, len(a)
    is_aligned_a, is_aligned_b = is_aligned(call.a_spec), is_aligned(call.b_spec)
    shrink = shrink_tiles(x.dtype, R, is_aligned_a and D % 16 == 0)
    expand = expand_tiles(x.dtype, R, is_aligned_b and len(b) % 16 == 0)
    splits = triton.cdiv(D, SPLIT_K)
    partials = torch.empty(splits, T, R, dtype=torch.float32, device=x.device)
    h = torch.empty(T, R, dtype=x.dtype, device=x.device)
    tables = (sent.pairs, sent.scalars.directions, sent.scalars.factors)
    domain = sent.scalars.domain
    constants: dict[str, Any] = {
        "DOMAIN": MIXED.value if domain is None else domain,
        "IS_PAIR": sent.has_second,
        # Nothing is contracted but what the kernels say.
        "enable_fp_fusion": False,
    }
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        num_tiles = triton.cdiv(sent.max_rows, shrink["BLOCK_M"])
        num_parts = splits * triton.cdiv(R, shrink["BLOCK_R"])
        shrink_kernel[(num_tiles, num_parts, len(sent.pairs))](
            x,
            a,
            partials,
            *tables,
            x.stride(0),
            a.stride(0),
            T,
            D,
            R,
            *place_of(call.a_spec),
            IS_ALIGNED=is_aligned_a,
            **constants,
            **shrink,
        )
        finish_kernel[(triton.cdiv(T * R, FINISH_BLOCK),)](
            partials, h, T * R, splits, BLOCK=FINISH_BLOCK
        )
        num_tiles = triton.cdiv(sent.max_rows, expand["BLOCK_M"])
        expand_kernel[(num_tiles, triton.cdiv(len(b), expand["BLOCK_N"]), len(sent.pairs))](
            h,
            b,
            y,
            *tables,
            b.stride(0),
            y.stride(0),
            len(b),
            R,
            *place_of(call.b_spec),
            call.scaling,
            IS_ALIGNED=is_aligned_b,
            IS_ADDED=call.is_added,
            **constants,
            **expand,
        )


def place_of(spec: TensorSpec) -> tuple[int, int, int]:
    """(uid as int32, first element, columns of the whole tensor)."""
    uid = spec.uid - (spec.uid >> 31 << 32)
    return uid, spec.row0 * spec.whole_shape[1] + spec.col0, spec.whole_shape[1]


def is_aligned(spec: TensorSpec) -> bool:
    """Whether four columns from a multiple of four on are one Philox group."""
    return spec.col0 % 4 == 0 and spec.whole_shape[1] % 4 == 0
