"""A plan as a cascade of two batches of ordinary sequences, for kernels that know no sharing.

First pass: each group is one sequence, all its rows' tokens over the prefix. Second pass: each row
is a sequence over its own tokens. The two results of a token are merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from mezo_kernels import SharedPrefixPlan


@dataclass(frozen=True)
class Cascade:
    """Sequences of at least one token each, over at least one key each.

    Tokens without a prefix are last and not in the first pass: what kernels return for
    a sequence without keys differs (SGLang 0.5.17 stores NaN), and NaN survives a weight of 0.

    Args:
        token_order: the tokens in the order of both passes; None where they stand so already.
        group_indptr: `[N + 1]`, tokens of the groups that have both tokens and a prefix.
        kv_indptr: `[N + 1]`, ranges of ``kv_indices``.
        kv_indices: slots of these groups' prefixes, where the plan's lie.
        row_indptr: `[M + 1]`, tokens of the rows that have any.
    """

    token_order: list[int] | None
    group_indptr: list[int]
    kv_indptr: list[int]
    kv_indices: torch.Tensor
    row_indptr: list[int]

    @property
    def num_shared(self) -> int:
        """Tokens of the first pass: the first ones in the order."""
        return self.group_indptr[-1]

    @property
    def longest_group(self) -> int:
        """Tokens of the longest sequence of the first pass."""
        return _longest(self.group_indptr)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest sequence of the second pass."""
        return _longest(self.row_indptr)


def cascade_of(plan: SharedPrefixPlan) -> Cascade:
    """Sort the groups with a prefix to the front and drop what is empty."""
    lengths = [len(plan.row_tokens(row)) for row in range(plan.num_rows)]
    num_tokens = [sum(lengths[r] for r in plan.group_rows(g)) for g in range(plan.num_groups)]
    shared: list[int] = []
    unshared: list[int] = []
    for group, (begin, end) in enumerate(pairwise(plan.kv_indptr)):
        if num_tokens[group]:
            (shared if end > begin else unshared).append(group)
    rows = [row for group in (*shared, *unshared) for row in plan.group_rows(group) if lengths[row]]
    order = [token for row in rows for token in plan.row_tokens(row)]
    slots = [plan.prefix_slots(group) for group in shared]
    return Cascade(
        None if order == list(range(plan.num_tokens)) else order,
        _indptr(num_tokens[group] for group in shared),
        _indptr(len(own) for own in slots),
        torch.cat(slots) if slots else plan.kv_indices[:0],
        _indptr(lengths[row] for row in rows),
    )


def _indptr(lengths: Iterable[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _longest(indptr: list[int]) -> int:
    return max((stop - start for start, stop in pairwise(indptr)), default=0)
