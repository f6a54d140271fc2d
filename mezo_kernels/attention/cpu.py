"""The cpu backend: one call of the native kernel (csrc/cpu/attention.cpp) on a plan's tables."""

from dataclasses import dataclass

import torch

from mezo_kernels import _native
from mezo_kernels._per_plan import per_plan
from mezo_kernels.attention.inputs import AttentionInputs
from mezo_kernels.attention.plan import SharedPrefixPlan

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Tables:
    """What the kernel reads of a plan, all of it int64.

    Args:
        rows: `[R, 2]`, first token and end of each row, group by group.
        slots: `[kv_indptr[G]]`, contiguous, a private copy: it cannot change after the check.
        blocks: `[N, 6]`, rows of AttentionBlock (csrc/cpu/attention.h).
        addresses: of the three and N, as the native function expects them.
        lowest, highest: of the slots; 0 and -1 where there are none.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    blocks: torch.Tensor
    addresses: tuple[int, int, int, int]
    lowest: int
    highest: int


def attend(inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Write the attention of all rows, and the log-sum-exp where it is asked for."""
    q, k_cache, plan = inputs.q, inputs.k_cache, inputs.plan
    _, heads, dim = q.shape
    num_slots, kv_heads, _ = k_cache.shape
    tables = make_tables(plan, heads // kv_heads)
    if tables.lowest < 0 or tables.highest >= num_slots:
        raise IndexError(
            f"shared_prefix_attention: kv_indices must be slots of the caches, 0 to "
            f"{num_slots - 1}, got {tables.lowest} to {tables.highest}; pass the caches that the "
            "plan was made for."
        )
    tensors = (q, inputs.k_suffix, inputs.v_suffix, k_cache, inputs.v_cache, out)
    _native.module().cpu_attention(
        (*tables.addresses, heads, kv_heads, dim, out.shape[-1], _DTYPES[q.dtype]),
        [(tensor.data_ptr(), *tensor.stride()[:2]) for tensor in tensors],
        0 if lse is None else lse.data_ptr(),
        inputs.scale,
        inputs.soft_cap,
        torch.get_num_threads(),
    )


@per_plan
def make_tables(plan: SharedPrefixPlan, gqa: int) -> Tables:
    """The tables for models of ``gqa`` heads per KV head."""
    row_tokens = [plan.row_tokens(row) for row in plan.row_order]
    rows = torch.tensor([(own.start, own.stop) for own in row_tokens], dtype=torch.int64)
    slots = plan.kv_indices.to("cpu", copy=True, memory_format=torch.contiguous_format)
    found = [block for group in range(plan.num_groups) for block in _blocks(plan, group, gqa)]
    blocks = torch.tensor(found, dtype=torch.int64)
    return Tables(
        rows=rows,
        slots=slots,
        blocks=blocks,
        addresses=(rows.data_ptr(), slots.data_ptr(), blocks.data_ptr(), len(found)),
        lowest=int(slots.min()) if len(slots) else 0,
        highest=int(slots.max()) if len(slots) else -1,
    )


def _blocks(plan: SharedPrefixPlan, group: int, gqa: int) -> list[tuple[int, ...]]:
    """A group's packed queries, (row, token, head of the KV head) in this order, cut in blocks."""
    size = _native.module().ATTENTION_QUERIES
    row, last_row = plan.group_indptr[group : group + 2]
    prefix, prefix_end = plan.kv_indptr[group : group + 2]
    first, end = (gqa * plan.packed_indptr[i] for i in (row, last_row))
    blocks: list[tuple[int, ...]] = []
    for query in range(first, end, size):
        token, head = divmod(query, gqa)
        while plan.packed_indptr[row + 1] <= token:
            row += 1
        place = token - plan.packed_indptr[row]
        # In the kernel a row is two entries of `rows`.
        count = min(size, end - query)
        blocks.append((prefix, prefix_end - prefix, 2 * row, place, head, count))
    return blocks
