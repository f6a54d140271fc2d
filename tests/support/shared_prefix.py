"""Batches of rows that share prefixes, for tests and for the bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

import mezo_kernels as mk

# A group: the length of its prefix, and the lengths of its rows.
Group = tuple[int, Sequence[int]]


@dataclass
class Batch:
    """Tensors of one layer and the ranges that say which rows share which prefix."""

    tensors: list[torch.Tensor]  # q, k_suffix, v_suffix, k_cache, v_cache
    ranges: dict[str, torch.Tensor]
    scale: float

    def plan(self) -> mk.SharedPrefixPlan:
        return mk.SharedPrefixPlan(**self.ranges)

    def attend(self, **options):
        ranges = {} if "plan" in options else self.ranges
        options = {"scale": self.scale, **ranges} | options
        return mk.shared_prefix_attention(*self.tensors, **options)

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch([t.to(dtype) for t in self.tensors], self.ranges, self.scale)

    def reference(self, **options):
        """The reference in float64."""
        return self.to(torch.float64).attend(backend="reference", **options)


def random_batch(
    groups: Sequence[Group],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """A batch of these groups; slots of the cache that no prefix uses hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    v_dim = dim if v_dim is None else v_dim
    row_lens = [length for _, rows in groups for length in rows]
    prefix_lens = [prefix_len for prefix_len, _ in groups]
    num_tokens, num_used = sum(row_lens), sum(prefix_lens)
    # Every third slot or so stays unused, so that prefixes are scattered.
    num_slots = num_used + num_used // 2 + 3
    used = torch.randperm(num_slots, generator=generator)[:num_used]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    caches = []
    for width in (dim, v_dim):
        cache = torch.full((num_slots, kv_heads, width), torch.nan, dtype=dtype)
        cache[used] = normal(num_used, kv_heads, width)
        caches.append(cache)
    ranges = {
        "qo_indptr": _indptr(row_lens),
        "group_indptr": _indptr([len(rows) for _, rows in groups]),
        "kv_indptr": _indptr(prefix_lens),
        "kv_indices": used,
    }
    tensors = [
        normal(num_tokens, heads, dim),
        normal(num_tokens, kv_heads, dim),
        normal(num_tokens, kv_heads, v_dim),
        *caches,
    ]
    return Batch(tensors, ranges, dim**-0.5)


def twin_rows(batch: Batch) -> None:
    """Give the second half of each group's rows the contents of the first half, in place."""
    qo, group = batch.ranges["qo_indptr"].tolist(), batch.ranges["group_indptr"].tolist()
    for first, last in pairwise(group):
        start, middle, stop = qo[first], qo[(first + last) // 2], qo[last]
        assert middle - start == stop - middle
        for tensor in batch.tensors[:3]:
            tensor[middle:stop] = tensor[start:middle]


def shuffle_rows(batch: Batch, seed: int) -> tuple[Batch, mk.SharedPrefixPlan, torch.Tensor]:
    """The rows in another order: the batch, its plan, and its token for each token of the old."""
    old = batch.plan()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(old.num_rows, generator=generator).tolist()  # new row -> old row
    tokens = [token for row in order for token in old.row_tokens(row)]
    tensors = [t[tokens] for t in batch.tensors[:3]] + batch.tensors[3:]
    plan = mk.SharedPrefixPlan(
        _indptr([len(old.row_tokens(row)) for row in order]),
        *(batch.ranges[name] for name in ("group_indptr", "kv_indptr", "kv_indices")),
        row_order=[order.index(row) for row in range(old.num_rows)],
    )
    return Batch(tensors, batch.ranges, batch.scale), plan, torch.tensor(tokens).argsort()


def is_twins(batch: Batch, result: torch.Tensor) -> bool:
    """Whether the halves of each group have the same bits."""
    qo, group = batch.ranges["qo_indptr"].tolist(), batch.ranges["group_indptr"].tolist()
    halves = [(qo[a], qo[(a + b) // 2], qo[b]) for a, b in pairwise(group)]
    return all(torch.equal(result[a:m], result[m:b]) for a, m, b in halves)


def bound(batch: Batch, reference: torch.Tensor) -> float:
    """Rounding of scores near 1 (a walk of D steps), of a weighted sum (L), of the output."""
    q, _, _, _, _ = batch.tensors
    row_lens = batch.ranges["qo_indptr"].diff()
    longest = int(batch.ranges["kv_indptr"].diff().max()) + int(row_lens.max())
    walk = 4 * q.shape[-1] ** 0.5 + 2 * longest**0.5
    largest_v = float(
        torch.cat([t.flatten() for t in batch.tensors[2::2]]).nan_to_num().abs().max()
    )
    return 2**-24 * walk * largest_v + torch.finfo(q.dtype).eps * float(reference.abs().max())


def _indptr(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
