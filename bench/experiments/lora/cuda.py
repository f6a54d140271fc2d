"""The cuda backend: checks of what its kernels support, and addresses handed to the module."""

from __future__ import annotations

import torch

from bench.experiments import _native
from bench.experiments.lora.call import DeviceCall, LoraCall
from mezo_kernels.directions import cuda as directions
from mezo_kernels.directions.plan import output_row, tensor_row

RANKS = (8, 16, 32, 64)
# Elements of a 16-byte access of fp16 and bf16, and of two Philox groups.
_VECTOR = 8
# As in lora.cuh, shrink.cu and expand.cu of bench/experiments/csrc.
_TILE_ROWS, _BLOCK_OUTPUTS = 32, 128
# Blocks that a multiprocessor holds of either kernel, about.
_SHRINK_BLOCKS, _EXPAND_BLOCKS = 2, 5


def perturbed_lora(call: LoraCall) -> None:
    """Write the result of a call."""
    check(call)
    run(call.on_device())


def run(sent: DeviceCall) -> None:
    """Launch the kernels of a call whose tables are on the device; can be captured."""
    call, module = sent.call, _native.with_cuda()
    (T, _), R, x, y = call.x.shape, len(call.a), call.x, call.y
    splits = -(-call.x.shape[1] // module.LORA_SPLIT)
    h = torch.empty(T, R, dtype=x.dtype, device=x.device)
    partials = torch.empty(splits, T, R, dtype=torch.float32, device=x.device)
    memory = [*output_row(x), *output_row(y), h.data_ptr(), partials.data_ptr()]
    tables = (sent.pairs, sent.scalars.directions, sent.scalars.factors)
    module.cuda_perturbed_lora(
        [tensor_row(call.a, call.a_spec), tensor_row(call.b, call.b_spec)],
        memory,
        [table.data_ptr() for table in tables],
        [len(sent.pairs), T, *chunks(sent, splits)],
        call.scaling,
        call.is_added,
        directions._seed(sent.scalars),
        *directions._at(x.device),
    )


def chunks(sent: DeviceCall, splits: int) -> tuple[int, int]:
    """How many blocks share the rows of a pair in either half: as many as the device holds.

    Each makes the pair's part of the factor anew, so that more of them would only cost. No result
    depends on the choice.
    """
    tiles = -(-sent.max_rows // _TILE_ROWS)
    device = sent.call.x.device
    count = 1
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    halves = (
        (_SHRINK_BLOCKS, splits * max(1, len(sent.call.a) // 16)),
        (_EXPAND_BLOCKS, -(-len(sent.call.b) // _BLOCK_OUTPUTS)),
    )
    shrink, expand = (
        min(tiles, max(1, count * held // (blocks * len(sent.pairs)))) for held, blocks in halves
    )
    return shrink, expand


def check(call: LoraCall) -> None:
    """Raise for what the kernels do not support."""
    function, remedy = "perturbed_lora: backend 'cuda'", "use 'triton', which supports any"
    if call.x.dtype == torch.float32:
        raise NotImplementedError(
            f"{function} multiplies fp16 and bf16 on tensor cores, got x of {call.x.dtype}; "
            "use 'triton', which has IEEE products of fp32."
        )
    if len(call.a) not in RANKS:
        raise NotImplementedError(
            f"{function} must have a rank of {list(RANKS)}, got {len(call.a)}; {remedy}."
        )
    for what, tensor in (("x", call.x), ("a", call.a), ("b", call.b), ("out", call.y)):
        _, row_stride, _ = output_row(tensor)
        if tensor.data_ptr() % 16 or tensor.shape[1] % _VECTOR or row_stride % _VECTOR:
            raise NotImplementedError(
                f"{function} must have rows of {what} that begin at multiples of 16 bytes and are "
                f"multiples of {_VECTOR} long, got shape {tuple(tensor.shape)} stride "
                f"{tensor.stride()}; {remedy}."
            )
    for what, spec in (("a_spec", call.a_spec), ("b_spec", call.b_spec)):
        if spec.col0 % _VECTOR or spec.whole_shape[1] % _VECTOR:
            raise NotImplementedError(
                f"{function} must have a {what} with col0 and global columns that are multiples of "
                f"{_VECTOR}, got {spec}; {remedy}."
            )
