"""The work list of the triton backend: one entry per tile of queries and part of a prefix.

Rows and tokens are counted group by group here, as `SharedPrefixPlan.row_order` lists them.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from mezo_kernels.attention.plan import SharedPrefixPlan

# Prefix tokens of one program. A longer prefix is always split: if it were split only in batches of
# few groups, a row's bits would depend on the other rows.
SPLIT_LEN = 1024


@dataclass(frozen=True)
class WorkList:
    """The programs of the groups that have tiles of one shape, on the device.

    Args:
        block_m: packed queries of a tile, (token, head of a KV head) row-major.
        block_s: own tokens of a row that a round attends to.
        items: `[W, 8]` int32: first and past-the-last token of the group, first packed query of
            the tile, first and past-the-last entry of kv_indices, first and past-the-last row
            whose own tokens are attended to, place of the partial result or -1 where it is whole.
        merges: `[N, 5]` int32: first and past-the-last token of the group, first packed query of
            the tile, first partial result, number of them.
        num_partials: partial results in all.
    """

    block_m: int
    block_s: int
    items: torch.Tensor
    merges: torch.Tensor
    num_partials: int


def make_work(
    plan: SharedPrefixPlan,
    heads_per_kv_head: int,
    block_ms: tuple[int, ...],
    block_ss: tuple[int, int],
    long_row: int,
    device: torch.device,
) -> list[WorkList]:
    """Sort the groups by the shape of their tiles, and cut them into tiles.

    Args:
        plan: of the batch.
        heads_per_kv_head: query heads of a KV head.
        block_ms: tile heights, lowest first; a group has the first that holds all its queries.
        block_ss: own tokens of a round, where no row of a group is long, and where one is.
        long_row: a row of more tokens is long.
        device: of the lists.

    Returns:
        A list for each shape. Only the group decides it, so a group's bits do not depend on the
        batch.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for group in range(plan.num_groups):
        num_queries = len(_tokens(plan, group)) * heads_per_kv_head
        if num_queries:
            block_m = next((m for m in block_ms if num_queries <= m), block_ms[-1])
            block_s = block_ss[_longest_row(plan, group) > long_row]
            members.setdefault((block_m, block_s), []).append(group)
    return [
        _work_list(plan, heads_per_kv_head, *shape, groups, device)
        for shape, groups in sorted(members.items())
    ]


def _longest_row(plan: SharedPrefixPlan, group: int) -> int:
    """Tokens of the longest row of a group."""
    ends = plan.packed_indptr[plan.group_indptr[group] : plan.group_indptr[group + 1] + 1]
    return max(end - begin for begin, end in pairwise(ends))


def _work_list(
    plan: SharedPrefixPlan,
    heads: int,
    block_m: int,
    block_s: int,
    groups: list[int],
    device: torch.device,
) -> WorkList:
    items: list[tuple[int, ...]] = []
    merges: list[tuple[int, ...]] = []
    num_partials = 0
    for group in groups:
        tokens = _tokens(plan, group)
        begin, end = plan.kv_indptr[group], plan.kv_indptr[group + 1]
        num_splits = max(1, -(-(end - begin) // SPLIT_LEN))
        for m_start in range(0, len(tokens) * heads, block_m):
            rows = _rows_of_tile(plan, group, heads, m_start, m_start + block_m)
            for split in range(num_splits):
                start = begin + split * SPLIT_LEN
                is_last = split == num_splits - 1
                # The last part of the prefix goes on with the rows' own tokens.
                own = (rows.start, rows.stop) if is_last else (0, 0)
                place = -1 if num_splits == 1 else num_partials + split
                stop = min(end, start + SPLIT_LEN)
                items.append((tokens.start, tokens.stop, m_start, start, stop, *own, place))
            if num_splits > 1:
                merges.append((tokens.start, tokens.stop, m_start, num_partials, num_splits))
                num_partials += num_splits
    return WorkList(
        block_m,
        block_s,
        torch.tensor(items, dtype=torch.int32, device=device),
        torch.tensor(merges, dtype=torch.int32, device=device).view(-1, 5),
        num_partials,
    )


def _tokens(plan: SharedPrefixPlan, group: int) -> range:
    """Places of a group's tokens, group by group."""
    first, last = plan.group_indptr[group], plan.group_indptr[group + 1]
    return range(plan.packed_indptr[first], plan.packed_indptr[last])


def _rows_of_tile(
    plan: SharedPrefixPlan, group: int, heads: int, m_start: int, m_stop: int
) -> range:
    """The rows that have tokens among the packed queries of a tile."""
    first = _tokens(plan, group).start
    token_start, token_stop = first + m_start // heads, first + (m_stop - 1) // heads + 1
    rows = [
        row
        for row in range(plan.group_indptr[group], plan.group_indptr[group + 1])
        if plan.packed_indptr[row] < token_stop and plan.packed_indptr[row + 1] > token_start
    ]
    return range(rows[0], rows[-1] + 1)
