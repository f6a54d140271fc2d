"""The triton backend: (token, head of a KV head) packed in M, the prefix streamed once per tile.

Only the group decides rounding: the tiles, their order, where a prefix is split. So a group's bits
do not depend on the batch. The own tokens of a tile's rows are attended to row by row, each row
from its first token, so rows with equal contents get the same bits wherever they are.
"""

import dataclasses
from dataclasses import dataclass

import torch
import triton

from mezo_kernels._arch import HOPPER, current_arch
from mezo_kernels._per_plan import per_plan
from mezo_kernels.attention.inputs import AttentionInputs
from mezo_kernels.attention.plan import SharedPrefixPlan
from mezo_kernels.attention.triton.kernel import merge_splits_kernel, shared_prefix_kernel
from mezo_kernels.attention.triton.work import WorkList, make_work

# Rows with more tokens of their own than this run through them in wide blocks.
LONG_ROW = 64


def tiles_of(dtype: torch.dtype, dim: int, block_m: int, block_s: int, arch: int) -> dict[str, int]:
    """Tile sizes and launch options; they may depend on a group, never on a batch.

    Args:
        dtype: of the inputs.
        dim: the wider of the head dims, of keys and of values.
        block_m: packed queries of a tile, one of `block_ms`.
        block_s: own tokens of a round, one of `block_ss`.
        arch: compute capability times 10.

    Returns:
        BLOCK_N and BLOCK_S, and what a launch takes: num_warps, num_stages, perhaps maxnreg.
    """
    if dtype == torch.float32:
        # IEEE products run on the CUDA cores, with both operands in registers.
        return {"BLOCK_N": 16, "BLOCK_S": block_s, "num_warps": 4, "num_stages": 1}
    tiles = {"BLOCK_N": 64 if dim <= 128 else 32, "BLOCK_S": block_s}
    if block_m == 16:
        # A third stage would take its registers from other blocks, which hide the loads as well: at
        # head dim 128 a multiprocessor has 5 blocks with 2 stages, 3 or 4 with 3.
        return tiles | {"num_warps": 4, "num_stages": 2}
    # With 2 stages, each round of the prefix waits for its kv_indices: a load through an index can
    # be ahead of its use only if the index is one round further ahead.
    tiles["num_stages"] = 3
    # With 4 warps the tall tile spills from head dim 80 on.
    tiles["num_warps"] = 8 if dim > 64 else 4
    if arch == HOPPER and 64 < dim <= 128 and (block_s == 16 or dim == 128):
        # Two blocks at once, and nothing spills: without a limit the compiler takes up to 190 for
        # some heads and versions. Of long rows, the masks of an uneven head dim spill.
        tiles["maxnreg"] = 128
    return tiles


def block_ms(dtype: torch.dtype) -> tuple[int, ...]:
    """The tile heights of a dtype; one of 32 spilled for head dims 80, 128 and 256."""
    return (16,) if dtype == torch.float32 else (16, 64)


def block_ss(dtype: torch.dtype, dim: int, arch: int) -> tuple[int, int]:
    """Own tokens of a round: of groups of short rows, and of a group that has a long one.

    64 of head dim 256 need more shared memory than there is, and before Hopper more registers.
    """
    if dtype == torch.float32 or arch < HOPPER:
        return (16, 16)
    return (16, 64 if dim <= 128 else 32)


@dataclass(frozen=True)
class Tables:
    """What the kernels need of a plan, on the device of a call."""

    work: list[WorkList]
    packed_indptr: torch.Tensor
    token_order: torch.Tensor | None  # None where rows stand group by group already
    kv_indices: torch.Tensor
    partials: torch.Tensor


def attend(inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Write the attention of all rows, and the log-sum-exp where it is asked for."""
    dim = max(inputs.q.shape[-1], out.shape[-1])
    # Triton launches on the current device.
    with torch.cuda.device_of(out):
        arch = current_arch()
        tables = _tables(
            inputs.plan,
            out.device,
            inputs.heads_per_kv_head,
            inputs.num_kv_heads,
            block_ms(out.dtype),
            block_ss(out.dtype, dim, arch),
            # Values, and the largest score and the sum of weights.
            out.shape[-1] + 2,
        )
        order = tables.token_order
        if order is None:
            _launch_all(inputs, tables, out, lse, arch)
            return
        # Looking the tokens up inside the kernel cost registers that some shapes do not have.
        q, k_suffix, v_suffix = (t[order] for t in (inputs.q, inputs.k_suffix, inputs.v_suffix))
        packed = dataclasses.replace(inputs, q=q, k_suffix=k_suffix, v_suffix=v_suffix)
        packed_out = torch.empty_like(out)
        packed_lse = None if lse is None else torch.empty_like(lse)
        _launch_all(packed, tables, packed_out, packed_lse, arch)
        out[order] = packed_out
        if lse is not None and packed_lse is not None:
            lse[order] = packed_lse


def _launch_all(
    inputs: AttentionInputs,
    tables: Tables,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    arch: int,
) -> None:
    for work in tables.work:
        _launch(inputs, tables, work, out, lse, arch)


def _launch(
    inputs: AttentionInputs,
    tables: Tables,
    work: WorkList,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    arch: int,
) -> None:
    dim, v_dim = inputs.q.shape[-1], out.shape[-1]
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (dim, v_dim))
    flags = {"GQA": inputs.heads_per_kv_head, "D_V": v_dim, "HAS_LSE": lse is not None}
    shape = {"BLOCK_M": work.block_m, "BLOCK_DV": block_dv}
    named = (inputs.q, inputs.k_suffix, inputs.v_suffix, inputs.k_cache, inputs.v_cache)
    lse_or_any = out if lse is None else lse
    shared_prefix_kernel[(len(work.items), inputs.num_kv_heads)](
        *named,
        out,
        lse_or_any,
        tables.partials,
        work.items,
        tables.packed_indptr,
        tables.kv_indices,
        *(stride for tensor in named for stride in tensor.stride()[:2]),
        inputs.scale,
        inputs.soft_cap,
        D=dim,
        HAS_CAP=inputs.soft_cap != 0,
        BLOCK_D=block_d,
        **flags,
        **shape,
        **tiles_of(inputs.q.dtype, max(dim, v_dim), work.block_m, work.block_s, arch),
    )
    if len(work.merges):
        merge_splits_kernel[(len(work.merges), inputs.num_kv_heads)](
            tables.partials, out, lse_or_any, work.merges, **flags, **shape, num_warps=8
        )


@per_plan
def _tables(
    plan: SharedPrefixPlan,
    device: torch.device,
    heads: int,  # per KV head
    kv_heads: int,
    heights: tuple[int, ...],
    own: tuple[int, int],
    width: int,
) -> Tables:
    """The tables of a plan for calls of one shape; a partial row has ``width`` floats."""
    work = make_work(plan, heads, heights, own, LONG_ROW, device)
    # The work lists run one after another, so one scratch serves all.
    size = max((w.num_partials * w.block_m for w in work), default=0) * kv_heads * width
    return Tables(
        work,
        torch.tensor(plan.packed_indptr, dtype=torch.int32, device=device),
        None if plan.is_packed else torch.tensor(plan.token_order(), device=device),
        plan.kv_indices.to(device),
        torch.empty(size, dtype=torch.float32, device=device),
    )
