"""SharedPrefixPlan: which rows share which prefix, checked once and turned into tables."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

Indices = torch.Tensor | Sequence[int]


class SharedPrefixPlan:
    """The layout of a batch whose rows share prefixes, built once and used by every layer.

        row r = tokens qo_indptr[r] .. qo_indptr[r + 1]
        group g = rows row_order[i] for i in group_indptr[g] .. group_indptr[g + 1]
        prefix of g = slots kv_indices[kv_indptr[g] .. kv_indptr[g + 1]]

    Each backend derives its tables from a plan once and keeps them as long as the plan, so that a
    call checks shapes only and computes no index.

    Args:
        qo_indptr: `[R + 1]` ints from 0, token ranges of the rows; rows may be empty.
        group_indptr: `[G + 1]` ints from 0 to R, ranges of the groups in ``row_order``.
        kv_indptr: `[G + 1]` ints from 0, ranges of ``kv_indices``; a prefix may be empty.
        kv_indices: `[kv_indptr[G]]` ints, slots of the caches, one per token (page size 1).
        row_order: R numbers of rows, group by group; None where groups follow one another.

    Raises:
        ValueError: a range that does not begin at 0 or decreases, lengths that do not match, or a
            row order that is no permutation.

    Numerics: none. Graph-safe: building it is not; calls through it are (triton). Cost: the ranges
    are read on the host, so tensors on a GPU cost a synchronisation each: pass lists or CPU
    tensors; ``kv_indices`` may lie anywhere, its contents are not read here.

    Example:
        >>> plan = SharedPrefixPlan([0, 2, 3], [0, 2], [0, 3], [5, 0, 2])
        >>> plan.num_tokens, plan.num_rows, plan.num_groups
        (3, 2, 1)
        >>> plan.prefix_slots(0)
        tensor([5, 0, 2])
    """

    def __init__(
        self,
        qo_indptr: Indices,
        group_indptr: Indices,
        kv_indptr: Indices,
        kv_indices: Indices,
        *,
        row_order: Sequence[int] | None = None,
    ) -> None:
        self.qo_indptr = _ranges("qo_indptr", qo_indptr)
        self.group_indptr = _ranges("group_indptr", group_indptr)
        self.kv_indptr = _ranges("kv_indptr", kv_indptr)
        self.kv_indices = torch.as_tensor(kv_indices, dtype=torch.int64)
        self.num_tokens = self.qo_indptr[-1]
        self.num_rows = len(self.qo_indptr) - 1
        self.num_groups = len(self.group_indptr) - 1
        self.row_order = range(self.num_rows) if row_order is None else list(row_order)
        self._check_lengths()
        # Entry i of `row_order` has the places packed_indptr[i] .. in `token_order`.
        lengths = [len(self.row_tokens(row)) for row in self.row_order]
        self.packed_indptr = [0, *accumulate(lengths)]

    def row_tokens(self, row: int) -> range:
        """Tokens of a row."""
        return range(self.qo_indptr[row], self.qo_indptr[row + 1])

    @property
    def is_packed(self) -> bool:
        """Whether the rows stand group by group."""
        return list(self.row_order) == list(range(self.num_rows))

    def token_order(self) -> list[int]:
        """The tokens group by group."""
        return [token for row in self.row_order for token in self.row_tokens(row)]

    def group_rows(self, group: int) -> Sequence[int]:
        """Rows of a group."""
        return self.row_order[self.group_indptr[group] : self.group_indptr[group + 1]]

    def prefix_slots(self, group: int) -> torch.Tensor:
        """Cache slots of a group's prefix."""
        return self.kv_indices[self.kv_indptr[group] : self.kv_indptr[group + 1]]

    def _check_lengths(self) -> None:
        if self.group_indptr[-1] != self.num_rows:
            raise ValueError(
                f"SharedPrefixPlan: group_indptr must end at the number of rows, {self.num_rows}, "
                f"got {self.group_indptr[-1]}; put a row without companions in a group of its own."
            )
        if sorted(self.row_order) != list(range(self.num_rows)):
            raise ValueError(
                f"SharedPrefixPlan: row_order must hold every row 0 .. {self.num_rows - 1} once, "
                f"got {len(self.row_order)} entries that do not; list the rows group by group."
            )
        if len(self.kv_indptr) != self.num_groups + 1:
            raise ValueError(
                f"SharedPrefixPlan: kv_indptr must have one entry per group and one more, "
                f"{self.num_groups + 1}, got {len(self.kv_indptr)}; give a group without a prefix "
                "an empty range."
            )
        if self.kv_indices.shape != (self.kv_indptr[-1],):
            raise ValueError(
                f"SharedPrefixPlan: kv_indices must be [{self.kv_indptr[-1]}], where kv_indptr "
                f"ends, got {tuple(self.kv_indices.shape)}; pass one slot per prefix token."
            )


def _ranges(what: str, indptr: Indices) -> list[int]:
    values = torch.as_tensor(indptr).tolist()
    if not isinstance(values, list) or not values or not all(isinstance(v, int) for v in values):
        raise ValueError(
            f"SharedPrefixPlan: {what} must be a list or a 1-D tensor of ints with at least one "
            "entry, got another shape or dtype; pass [0] for none."
        )
    if values[0] != 0 or any(b < a for a, b in pairwise(values)):
        raise ValueError(
            f"SharedPrefixPlan: {what} must begin at 0 and never decrease, got ranges that do not; "
            "pass cumulative sums of lengths."
        )
    return values
