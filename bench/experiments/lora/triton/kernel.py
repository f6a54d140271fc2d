"""Device code of perturbed_lora in tiles: each program makes its part of a factor, for both copies.

A tile of rows is one of copy 0 and one of copy 1 of a pair, so that one z serves both signs.
"""

import triton
import triton.language as tl

from mezo_kernels.directions.triton.kernel import z_of_places
from mezo_kernels.directions.triton.philox import device, fma

# One binary whatever the number of rows: a specialised one could round differently. The others are
# kept from becoming constants.
JIT = triton.jit(do_not_specialize=["num_rows", "uid", "element0", "global_cols"])


@device
def _pair(pairs_ptr, scales_ptr, pair, tile, BLOCK_M: tl.constexpr):
    """(direction, scale, first row and end of each copy's part of a tile)."""
    row_ptr = pairs_ptr + 8 * pair
    direction = tl.load(row_ptr)
    scale0 = tl.load(scales_ptr + tl.load(row_ptr + 1))
    scale1 = tl.load(scales_ptr + tl.load(row_ptr + 2))
    first0, first1 = tl.load(row_ptr + 3), tl.load(row_ptr + 4)
    last0, last1 = tl.load(row_ptr + 5), tl.load(row_ptr + 6)
    step = tile * BLOCK_M
    return direction, scale0, scale1, first0 + step, last0, first1 + step, last1


@device
def _z_tile(
    place,
    directions_ptr,
    direction,
    row0,
    col0,
    DOMAIN: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """z of a tile `[ROWS, COLS]` of a factor; 0, as is its scale, where there is no direction.

    Then a -0 of the master becomes +0, which no sum that begins with +0 shows.
    """
    uid, element0, global_cols = place
    z = tl.zeros((ROWS, COLS), dtype=tl.float32)
    if direction >= 0:
        row_ptr = directions_ptr + 4 * direction
        if IS_ALIGNED:
            # One Philox call for four columns. Groups are below 2**32, so they may wrap on the way.
            i = tl.arange(0, ROWS * COLS // 4)
            row = (row0 + i // (COLS // 4)).to(tl.uint32)
            group0 = (element0.to(tl.int64) >> 2).to(tl.uint32)
            groups_in_row = (global_cols.to(tl.int64) >> 2).to(tl.uint32)
            col = (col0 // 4 + i % (COLS // 4)).to(tl.uint32)
            group = group0 + row * groups_in_row + col
            z = z_of_places(group, uid.to(tl.uint32), row_ptr, DOMAIN, 1).reshape(ROWS, COLS)
        else:
            rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)
            cols = (col0 + tl.arange(0, COLS)).to(tl.int64)
            element = element0.to(tl.int64) + rows[:, None] * global_cols + cols[None, :]
            z = z_of_places(element, uid.to(tl.uint32), row_ptr, DOMAIN, 0)
    return z


@JIT
def shrink_kernel(
    x_ptr,
    a_ptr,
    partials_ptr,
    pairs_ptr,
    directions_ptr,
    scales_ptr,
    stride_x,
    stride_a,
    num_rows,
    D,
    R,
    uid,
    element0,
    global_cols,
    DOMAIN: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Write the sums over one part of D_in, `[splits, T, R]`, of a tile of rows."""
    dtype = x_ptr.dtype.element_ty
    direction, scale0, scale1, first0, last0, first1, last1 = _pair(
        pairs_ptr, scales_ptr, tl.program_id(2), tl.program_id(0), BLOCK_M
    )
    num_rank_blocks = tl.cdiv(R, BLOCK_R)
    split = tl.program_id(1) // num_rank_blocks
    rank0 = tl.program_id(1) % num_rank_blocks * BLOCK_R
    offs_r = rank0 + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    offs_0 = first0 + tl.arange(0, BLOCK_M)
    offs_1 = first1 + tl.arange(0, BLOCK_M)
    a_ptrs = a_ptr + offs_r.to(tl.int64)[:, None] * stride_a + offs_k[None, :]
    x0_ptrs = x_ptr + offs_0.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
    x1_ptrs = x_ptr + offs_1.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
    sum0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    sum1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    place = (uid, element0, global_cols)
    for k in range(split * SPLIT_K, min(D, (split + 1) * SPLIT_K), BLOCK_K):
        mask_k = (offs_k < D - k)[None, :]
        master = tl.load(a_ptrs + k, mask=(offs_r < R)[:, None] & mask_k, other=0.0)
        z = _z_tile(
            place, directions_ptr, direction, rank0, k, DOMAIN, IS_ALIGNED, BLOCK_R, BLOCK_K
        )
        # Columns beyond D meet zeros of x; ranks beyond R are not stored.
        a0 = fma(z, scale0, master).to(dtype)
        x0 = tl.load(x0_ptrs + k, mask=(offs_0 < last0)[:, None] & mask_k, other=0.0)
        sum0 = tl.dot(x0, tl.trans(a0), sum0, input_precision="ieee")
        if IS_PAIR:
            a1 = fma(z, scale1, master).to(dtype)
            x1 = tl.load(x1_ptrs + k, mask=(offs_1 < last1)[:, None] & mask_k, other=0.0)
            sum1 = tl.dot(x1, tl.trans(a1), sum1, input_precision="ieee")
    out_ptr = partials_ptr + split.to(tl.int64) * num_rows * R
    mask_r = (offs_r < R)[None, :]
    ptrs = out_ptr + offs_0.to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(ptrs, sum0, mask=(offs_0 < last0)[:, None] & mask_r)
    if IS_PAIR:
        ptrs = out_ptr + offs_1.to(tl.int64)[:, None] * R + offs_r[None, :]
        tl.store(ptrs, sum1, mask=(offs_1 < last1)[:, None] & mask_r)


@triton.jit(do_not_specialize=["size", "num_splits"])
def finish_kernel(partials_ptr, h_ptr, size, num_splits, BLOCK: tl.constexpr):
    """Add the parts in their order and round."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, num_splits):
        total += tl.load(partials_ptr + tl.cast(split, tl.int64) * size + offs, mask=offs < size)
    tl.store(h_ptr + offs, total.to(h_ptr.dtype.element_ty), mask=offs < size)


@device
def _spread_once(factor):
    rows: tl.constexpr = factor.shape[0]
    cols: tl.constexpr = factor.shape[1]
    return tl.join(factor, tl.zeros_like(factor)).reshape(rows, 2 * cols)


@device
def _spread(factor, PADS: tl.constexpr):
    """Columns 2**PADS apart with zeros in between, for the least depth of a product."""
    for _ in tl.static_range(PADS):
        factor = _spread_once(factor)
    return factor


@device
def _store_rows(
    y_ptr, stride_y, D_out, offs_m, last, offs_n, total, scaling, IS_ADDED: tl.constexpr
):
    mask = (offs_m < last)[:, None] & (offs_n < D_out)[None, :]
    ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_y + offs_n[None, :]
    if IS_ADDED:
        y = fma(total, scaling, tl.load(ptrs, mask=mask, other=0.0).to(tl.float32))
    else:
        y = total * scaling
    tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@JIT
def expand_kernel(
    h_ptr,
    b_ptr,
    y_ptr,
    pairs_ptr,
    directions_ptr,
    scales_ptr,
    stride_b,
    stride_y,
    D_out,
    R,
    uid,
    element0,
    global_cols,
    scaling,
    DOMAIN: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_PAIR: tl.constexpr,
    IS_ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADS: tl.constexpr,
):
    """Write a tile of y."""
    dtype = h_ptr.dtype.element_ty
    direction, scale0, scale1, first0, last0, first1, last1 = _pair(
        pairs_ptr, scales_ptr, tl.program_id(2), tl.program_id(0), BLOCK_M
    )
    output0 = tl.program_id(1) * BLOCK_N
    offs_n = output0 + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    offs_0 = first0 + tl.arange(0, BLOCK_M)
    offs_1 = first1 + tl.arange(0, BLOCK_M)
    # The ranks as `_spread` places them.
    spread = tl.arange(0, BLOCK_R << PADS)
    is_rank, rank = spread % (1 << PADS) == 0, spread >> PADS
    b_ptrs = b_ptr + offs_n.to(tl.int64)[:, None] * stride_b + offs_r[None, :]
    sum0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sum1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    place = (uid, element0, global_cols)
    for r in range(0, R, BLOCK_R):
        mask_r = (offs_r < R - r)[None, :]
        master = tl.load(b_ptrs + r, mask=(offs_n < D_out)[:, None] & mask_r, other=0.0)
        z = _z_tile(
            place, directions_ptr, direction, output0, r, DOMAIN, IS_ALIGNED, BLOCK_N, BLOCK_R
        )
        mask_h = (is_rank & (rank < R - r))[None, :]
        h_ptrs = h_ptr + r + rank[None, :]
        b0 = _spread(fma(z, scale0, master).to(dtype), PADS)
        h0_ptrs = h_ptrs + offs_0.to(tl.int64)[:, None] * R
        h0 = tl.load(h0_ptrs, mask=(offs_0 < last0)[:, None] & mask_h, other=0.0)
        sum0 = tl.dot(h0, tl.trans(b0), sum0, input_precision="ieee")
        if IS_PAIR:
            b1 = _spread(fma(z, scale1, master).to(dtype), PADS)
            h1_ptrs = h_ptrs + offs_1.to(tl.int64)[:, None] * R
            h1 = tl.load(h1_ptrs, mask=(offs_1 < last1)[:, None] & mask_h, other=0.0)
            sum1 = tl.dot(h1, tl.trans(b1), sum1, input_precision="ieee")
    _store_rows(y_ptr, stride_y, D_out, offs_0, last0, offs_n, sum0, scaling, IS_ADDED)
    if IS_PAIR:
        _store_rows(y_ptr, stride_y, D_out, offs_1, last1, offs_n, sum1, scaling, IS_ADDED)
