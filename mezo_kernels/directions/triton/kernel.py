"""The Triton kernel of the direction calls: one program for each entry of a plan's work list.

Like a MeZO step itself it reads the master once, adds the update's directions in registers, writes
the master back, and writes every slot. Everything that changes from call to call lies in device
memory, so a launch can be captured in a CUDA graph.
"""

import triton
import triton.language as tl

from mezo_kernels.directions.plan import DTYPE_CODES
from mezo_kernels.directions.triton.philox import (
    INTERPRET,
    RADEMACHER,
    device,
    fma,
    gaussian_of_elements,
    gaussian_of_groups,
    rademacher_of_elements,
    rademacher_of_groups,
)

FLOAT32, FLOAT16, BFLOAT16 = (tl.constexpr(code) for code in DTYPE_CODES.values())
# In place of a dtype or a domain: it differs, and is read from the tables.
MIXED = tl.constexpr(-1)

# How a tensor lies in memory. FLAT and STRIDED: aligned vectors of `VECTOR` elements, and in FLAT
# they follow one another, in the element index as well. GENERAL: anything.
FLAT, STRIDED, GENERAL = (tl.constexpr(path) for path in range(3))
# Positions that the general path computes at once; more of them need more registers than there are.
GENERAL_STEP = tl.constexpr(512)


@device
def _pointer(address, first, DTYPE: tl.constexpr, PATH: tl.constexpr):
    """The address (int64) of a tensor as a pointer, `first` elements further in the flat path."""
    if DTYPE == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == FLOAT16:
        pointer = address.to(tl.pointer_type(tl.float16))
    elif INTERPRET:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    if PATH == FLAT:
        pointer += first
    if PATH != GENERAL:
        # Nothing is known of a pointer out of a table, and accesses would be one element wide.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@device
def _load_as(address, first, offsets, mask, DTYPE: tl.constexpr, PATH: tl.constexpr):
    values = tl.load(_pointer(address, first, DTYPE, PATH) + offsets, mask=mask)
    if INTERPRET and DTYPE == BFLOAT16:
        values = (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@device
def _store_as(address, first, offsets, mask, values, DTYPE: tl.constexpr, PATH: tl.constexpr):
    if DTYPE == FLOAT16:
        values = values.to(tl.float16)
    elif DTYPE == BFLOAT16:
        values = _bfloat16_bits(values) if INTERPRET else values.to(tl.bfloat16)
    tl.store(_pointer(address, first, DTYPE, PATH) + offsets, values, mask=mask)


@device
def _bfloat16_bits(values):
    """The bits of fp32 values rounded to bf16, nearest even; the interpreter's cast is not."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, 0x7FFF).to(tl.uint16)


@device
def _load(address, first, offsets, mask, dtype, DTYPE: tl.constexpr, PATH: tl.constexpr):
    """fp32 values of a tensor whose dtype is `DTYPE`, or the run-time `dtype` where it is MIXED."""
    if DTYPE != MIXED:
        values = _load_as(address, first, offsets, mask, DTYPE, PATH)
    elif dtype == FLOAT32:
        values = _load_as(address, first, offsets, mask, FLOAT32, PATH)
    elif dtype == FLOAT16:
        values = _load_as(address, first, offsets, mask, FLOAT16, PATH)
    else:
        values = _load_as(address, first, offsets, mask, BFLOAT16, PATH)
    return values


@device
def _store(address, first, offsets, mask, values, dtype, DTYPE: tl.constexpr, PATH: tl.constexpr):
    """Round fp32 values to the tensor's dtype and write them."""
    if DTYPE != MIXED:
        _store_as(address, first, offsets, mask, values, DTYPE, PATH)
    elif dtype == FLOAT32:
        _store_as(address, first, offsets, mask, values, FLOAT32, PATH)
    elif dtype == FLOAT16:
        _store_as(address, first, offsets, mask, values, FLOAT16, PATH)
    else:
        _store_as(address, first, offsets, mask, values, BFLOAT16, PATH)


@device
def _memory(row_ptr):
    """Address, row stride and dtype of a TensorRow or OutputRow."""
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)


@device
def _offsets(row, col, row_stride, PATH: tl.constexpr, VECTOR: tl.constexpr):
    """Element offsets in a tensor: `[V, VECTOR]`, or `[GENERAL_STEP]` in the general path."""
    if PATH == GENERAL:
        return row * row_stride + col
    elif PATH == STRIDED:
        begin = row.to(tl.uint64) * row_stride.to(tl.uint32) + col.to(tl.uint64) * VECTOR
        return tl.multiple_of(begin, VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    else:
        return (col * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]


@device
def _z_in(place, uid, step, tail, key0, key1, IS_RADEMACHER: tl.constexpr, GROUPS: tl.constexpr):
    if GROUPS == 0:
        if IS_RADEMACHER:
            return rademacher_of_elements(place, uid, step, tail, key0, key1)
        else:
            return gaussian_of_elements(place, uid, step, tail, key0, key1)
    else:
        if IS_RADEMACHER:
            return rademacher_of_groups(place, uid, step, tail, key0, key1, GROUPS)
        else:
            return gaussian_of_groups(place, uid, step, tail, key0, key1, GROUPS)


@device
def z_of_places(place, uid, direction_ptr, DOMAIN: tl.constexpr, GROUPS: tl.constexpr):
    """z under the direction of a DirectionRow; places are groups of four, or elements for 0."""
    key0, key1 = tl.load(direction_ptr).to(tl.uint32), tl.load(direction_ptr + 1).to(tl.uint32)
    step, tail = tl.load(direction_ptr + 2).to(tl.uint32), tl.load(direction_ptr + 3).to(tl.uint32)
    if DOMAIN != MIXED:
        z = _z_in(place, uid, step, tail, key0, key1, DOMAIN == RADEMACHER, GROUPS)
    elif tail >> 24 == RADEMACHER:
        z = _z_in(place, uid, step, tail, key0, key1, True, GROUPS)
    else:
        z = _z_in(place, uid, step, tail, key0, key1, False, GROUPS)
    return z


@device
def _perturb(
    tables,
    scalars,
    tensor,
    first,
    row,
    col,
    place,
    mask,
    PATH: tl.constexpr,
    MASTER: tl.constexpr,
    WRITES: tl.constexpr,
    DOMAIN: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Update some elements of a master and write them, perturbed, to the slots."""
    tensors_ptr, outputs_ptr, num_tensors = tables
    directions_ptr, factors_ptr, num_updates_ptr, max_updates = scalars
    GROUPS: tl.constexpr = 0 if PATH == GENERAL else VECTOR // 4
    row_ptr = tensors_ptr + tensor.to(tl.int64) * 9
    uid = tl.load(row_ptr + 5).to(tl.uint32)
    data, row_stride, dtype = _memory(row_ptr)
    offsets = _offsets(row, col, row_stride, PATH, VECTOR)
    values = _load(data, first, offsets, mask, dtype, MASTER, PATH)
    if HAS_UPDATE:
        num_updates = tl.load(num_updates_ptr)
        for j in range(num_updates):
            z = z_of_places(place, uid, directions_ptr + 4 * j, DOMAIN, GROUPS)
            values = fma(z, tl.load(factors_ptr + j), values)
        mask_update = mask & (num_updates > 0)
        _store(data, first, offsets, mask_update, values, dtype, MASTER, PATH)
    for w in tl.static_range(len(WRITES)):
        if WRITES[w][3]:
            z = z_of_places(
                place, uid, directions_ptr + 4 * (max_updates + WRITES[w][2]), DOMAIN, GROUPS
            )
        perturbed = values
        if WRITES[w][2] >= 0:
            perturbed = fma(z, tl.load(factors_ptr + max_updates + WRITES[w][0]), values)
        slot_ptr = outputs_ptr + (WRITES[w][0] * num_tensors + tensor).to(tl.int64) * 3
        slot, slot_stride, slot_dtype = _memory(slot_ptr)
        offsets = _offsets(row, col, slot_stride, PATH, VECTOR)
        _store(slot, first, offsets, mask, perturbed, slot_dtype, WRITES[w][1], PATH)


@device
def _rows_and_cols(first, cols, COUNT: tl.constexpr):
    """Row and column (int64) of the positions first ... first + COUNT - 1."""
    # One division of 64 bits, and for each position one of 32 bits.
    first_row = first // cols
    col = first - first_row * cols
    to_next_row = tl.minimum(cols - col, COUNT).to(tl.int32)
    i = tl.arange(0, COUNT)
    past = (i - to_next_row).to(tl.uint32) // tl.minimum(cols, COUNT).to(tl.uint32)
    rows_ahead = tl.where(i < to_next_row, 0, past.to(tl.int32) + 1).to(tl.int64)
    return first_row + rows_ahead, col + i - rows_ahead * cols


@device
def _block(
    tables,
    scalars,
    tensor,
    block,
    PATH: tl.constexpr,
    MASTER: tl.constexpr,
    WRITES: tl.constexpr,
    DOMAIN: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    WORK_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Find the elements of an entry of the work list, and where they are in the whole tensor."""
    row_ptr = tables[0] + tensor.to(tl.int64) * 9
    rows, cols = tl.load(row_ptr + 3), tl.load(row_ptr + 4)
    row0, col0, global_cols = tl.load(row_ptr + 6), tl.load(row_ptr + 7), tl.load(row_ptr + 8)
    first = block.to(tl.int64) * WORK_BLOCK
    if PATH == GENERAL:
        for start in range(0, WORK_BLOCK, GENERAL_STEP):
            row, col = _rows_and_cols(first + start, cols, GENERAL_STEP)
            element = (row0 + row) * global_cols + col0 + col
            _perturb(
                tables, scalars, tensor, first, row, col, element, row < rows,
                PATH, MASTER, WRITES, DOMAIN, HAS_UPDATE, VECTOR,
            )  # fmt: skip
    else:
        i = tl.arange(0, WORK_BLOCK // VECTOR)
        GROUPS: tl.constexpr = VECTOR // 4
        # Group numbers are below 2**32, so they may wrap on the way.
        group0 = ((row0 * global_cols + col0) >> 2).to(tl.uint32)
        if PATH == FLAT:
            row, col = i, i
            in_block = tl.minimum((rows * cols - first) // VECTOR, WORK_BLOCK // VECTOR)
            mask = i < in_block.to(tl.int32)
            group = group0 + (first >> 2).to(tl.uint32) + i.to(tl.uint32) * GROUPS
        else:
            position = (first // VECTOR).to(tl.uint32) + i.to(tl.uint32)
            vectors_in_row = (cols // VECTOR).to(tl.uint32)
            row = position // vectors_in_row
            col = position - row * vectors_in_row
            mask = row < rows.to(tl.uint32)
            group = group0 + row * (global_cols >> 2).to(tl.uint32) + col * GROUPS
        _perturb(
            tables, scalars, tensor, first, row, col, group, mask[:, None],
            PATH, MASTER, WRITES, DOMAIN, HAS_UPDATE, VECTOR,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_tensors", "max_updates"],
    do_not_specialize_on_alignment=[
        "tensors_ptr", "outputs_ptr", "work_ptr", "paths_ptr",
        "directions_ptr", "factors_ptr", "num_updates_ptr",
    ],
)  # fmt: skip
def perturb_kernel(
    tensors_ptr,
    outputs_ptr,
    work_ptr,
    paths_ptr,
    directions_ptr,
    factors_ptr,
    num_updates_ptr,
    num_tensors,
    max_updates,
    PATHS: tl.constexpr,
    MASTER: tl.constexpr,
    WRITES: tl.constexpr,
    DOMAIN: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    WORK_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Update the masters and write the slots of a plan: the kernel behind all three calls.

    The pointers are DeviceTables and Scalars. PATHS are the paths that the plan's tensors need,
    paths_ptr holds each tensor's. WRITES has for each slot (slot, dtype, direction or -1 for a
    plain copy, whether it is the direction's first), in the order of directions.
    """
    entry = tl.program_id(0)
    tensor, block = tl.load(work_ptr + 2 * entry), tl.load(work_ptr + 2 * entry + 1)
    tables = (tensors_ptr, outputs_ptr, num_tensors)
    scalars = (directions_ptr, factors_ptr, num_updates_ptr, max_updates)
    if len(PATHS) == 1:
        _block(
            tables, scalars, tensor, block,
            PATHS[0], MASTER, WRITES, DOMAIN, HAS_UPDATE, WORK_BLOCK, VECTOR,
        )  # fmt: skip
    else:
        path = tl.load(paths_ptr + tensor)
        for p in tl.static_range(len(PATHS)):
            if path == PATHS[p]:
                _block(
                    tables, scalars, tensor, block,
                    PATHS[p], MASTER, WRITES, DOMAIN, HAS_UPDATE, WORK_BLOCK, VECTOR,
                )  # fmt: skip
