"""The cpu backend: groups of one shape through a handful of batched torch operations.

The prefix and the rows' own tokens are scored apart and share one softmax: own tokens stand at the
same places of the softmax for each row, so rows of one content get the same bits.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from mezo_kernels.attention.inputs import AttentionInputs
from mezo_kernels.attention.plan import SharedPrefixPlan

# Prefixes are padded to multiples of this and no further: BLAS splits long sums by their length, so
# padding to the longest prefix of a batch would let other groups change a group's bits. Measured
# for prefixes of 20 to 400: as fast as steps that grow, and 3 % faster than multiples of 128.
PREFIX_BLOCK = 64


@dataclass(frozen=True)
class Bucket:
    """Groups with one number of rows, longest row and padded prefix length.

    Args:
        num_groups: groups in the bucket, N.
        num_rows: rows of each group.
        row_len: tokens of a row, S, after padding.
        prefix_len: prefix tokens of a group, P, after padding.
        tokens: `[N * H_kv * rows * S]`, rows of q and of the suffix as `[T * H_kv, ...]`.
        slots: `[N * H_kv * P]`, rows of the caches as `[slots * H_kv, ...]`.
        prefix_mask: `[N, 1, P]`, 0 or -inf at the padding; None where nothing is padded.
        causal_mask: `[S, 1, S]`; None for S = 1.
        valid: entries of ``tokens`` that are no padding; None where none is.
        written: ``tokens`` at ``valid``: the rows of the output.
    """

    num_groups: int
    num_rows: int
    row_len: int
    prefix_len: int
    tokens: torch.Tensor
    slots: torch.Tensor
    prefix_mask: torch.Tensor | None
    causal_mask: torch.Tensor | None
    valid: torch.Tensor | None
    written: torch.Tensor


def padded_prefix_len(prefix_len: int) -> int:
    """The next multiple of `PREFIX_BLOCK`: it depends on nothing but the length."""
    return -(-prefix_len // PREFIX_BLOCK) * PREFIX_BLOCK


def attend(inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Write the attention of all rows, and the log-sum-exp where it is asked for."""
    kv_heads, heads = inputs.num_kv_heads, inputs.heads_per_kv_head
    key = ("cpu", kv_heads)
    buckets = inputs.plan.tables.get(key)
    if buckets is None:
        buckets = inputs.plan.tables[key] = make_buckets(inputs.plan, kv_heads)
    assert isinstance(buckets, list)
    out_rows = out.view(-1, heads * out.shape[-1])
    lse_rows = None if lse is None else lse.view(-1, heads)
    tokens_of = [_token_rows(t, kv_heads) for t in (inputs.q, inputs.k_suffix, inputs.v_suffix)]
    for bucket in buckets:
        q, k, v = (rows.index_select(0, bucket.tokens).float() for rows in tokens_of)
        scores = _scores(inputs, bucket, q, k)
        packed = _weighted_values(inputs, bucket, scores.softmax(-1), v)
        _write(bucket, out_rows, packed.view(len(bucket.tokens), -1))
        if lse_rows is not None:
            _write(bucket, lse_rows, scores.logsumexp(-1).view(-1, heads))


def _token_rows(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[T, H, D]` as `[T * H_kv, heads of a KV head * D]`."""
    num_tokens, heads, dim = tensor.shape
    return tensor.contiguous().view(num_tokens * kv_heads, heads // kv_heads * dim)


def _prefix(cache: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """`[N * H_kv, P, D]` fp32 of a cache `[slots, H_kv, D]`."""
    kv_heads, dim = cache.shape[1:]
    if cache.is_contiguous():
        rows = cache.view(-1, dim).index_select(0, bucket.slots)
    else:
        rows = cache[bucket.slots // kv_heads, bucket.slots % kv_heads]
    return rows.float().view(-1, bucket.prefix_len, dim)


def _scores(
    inputs: AttentionInputs, bucket: Bucket, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """`[N * H_kv, M, S + P]`, M = rows * S * heads: the row's own keys, then the prefix."""
    num_own, own_len = bucket.num_groups * inputs.num_kv_heads, bucket.row_len
    dim = inputs.q.shape[-1]
    q = q.view(num_own * bucket.num_rows, -1, dim)
    q.mul_(inputs.scale)
    own = torch.bmm(q, k.view(-1, own_len, dim).transpose(1, 2))
    _cap_(own, inputs.soft_cap)
    if bucket.causal_mask is not None:
        own.view(-1, own_len, inputs.heads_per_kv_head, own_len).add_(bucket.causal_mask)
    own = own.view(num_own, -1, own_len)
    if not bucket.prefix_len:
        return own
    keys = _prefix(inputs.k_cache, bucket)
    prefix = torch.bmm(q.view(num_own, -1, dim), keys.transpose(1, 2))
    _cap_(prefix, inputs.soft_cap)
    if bucket.prefix_mask is not None:
        prefix.view(bucket.num_groups, -1, bucket.prefix_len).add_(bucket.prefix_mask)
    return torch.cat((own, prefix), dim=-1)


def _weighted_values(
    inputs: AttentionInputs, bucket: Bucket, weights: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """`[N * H_kv * rows, S * heads, D_v]` from the weights of `_scores`."""
    own_len, num_keys, dim = bucket.row_len, weights.shape[-1], v.shape[-1]
    v = v.view(-1, own_len, dim)
    own = weights.view(len(v), -1, num_keys)[..., :own_len]
    if not bucket.prefix_len:
        return torch.bmm(own, v)
    out = torch.bmm(weights[..., own_len:], _prefix(inputs.v_cache, bucket))
    return out.view(len(v), -1, dim).baddbmm_(own, v)


def _cap_(scores: torch.Tensor, soft_cap: float) -> None:
    if soft_cap:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)


def _write(bucket: Bucket, rows: torch.Tensor, packed: torch.Tensor) -> None:
    if bucket.valid is not None:
        packed = packed.index_select(0, bucket.valid)
    rows.index_copy_(0, bucket.written, packed.to(rows.dtype))


def make_buckets(plan: SharedPrefixPlan, kv_heads: int) -> list[Bucket]:
    """Sort the groups into buckets; which one depends on the group alone."""
    members: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for group in range(plan.num_groups):
        rows = plan.group_rows(group)
        row_len = max((len(plan.row_tokens(row)) for row in rows), default=0)
        if row_len:
            prefix_len = plan.kv_indptr[group + 1] - plan.kv_indptr[group]
            members[len(rows), row_len, padded_prefix_len(prefix_len)].append(group)
    return [_bucket(plan, kv_heads, groups, *shape) for shape, groups in members.items()]


def _bucket(
    plan: SharedPrefixPlan,
    kv_heads: int,
    groups: list[int],
    num_rows: int,
    row_len: int,
    prefix_len: int,
) -> Bucket:
    first_tokens, row_lens, slots, prefix_lens = [], [], [], []
    for group in groups:
        for row in plan.group_rows(group):
            own_tokens = plan.row_tokens(row)
            first_tokens.append(own_tokens.start)
            row_lens.append(len(own_tokens))
        own = plan.prefix_slots(group)
        prefix_lens.append(len(own))
        # Padding repeats a slot of the group: another one might hold NaN, and 0 * NaN is NaN.
        slots.append(torch.cat((own, own[-1:].expand(prefix_len - len(own)))))
    ends = torch.tensor(row_lens).view(-1, 1)
    offsets = torch.arange(row_len)
    # Padding repeats a token of the row; an empty row takes any token.
    places = torch.minimum(offsets, (ends - 1).clamp(min=0))
    places = (torch.tensor(first_tokens).view(-1, 1) + places).clamp(max=plan.num_tokens - 1)
    heads = torch.arange(kv_heads).view(1, -1, 1, 1)
    tokens_of = places.view(len(groups), 1, num_rows, row_len) * kv_heads + heads
    is_valid = (offsets < ends).view(len(groups), 1, num_rows, row_len).expand_as(tokens_of)
    tokens = tokens_of.flatten()
    valid = None if is_valid.all() else is_valid.flatten().nonzero()[:, 0]
    prefix_mask = None
    if min(prefix_lens) < prefix_len:
        is_pad = torch.arange(prefix_len) >= torch.tensor(prefix_lens).view(-1, 1, 1)
        prefix_mask = torch.zeros(is_pad.shape).masked_fill_(is_pad, -torch.inf)
    causal = torch.full((row_len, row_len), -torch.inf).triu_(1).view(row_len, 1, row_len)
    return Bucket(
        num_groups=len(groups),
        num_rows=num_rows,
        row_len=row_len,
        prefix_len=prefix_len,
        tokens=tokens,
        slots=(torch.stack(slots)[:, None] * kv_heads + torch.arange(kv_heads)[:, None]).flatten(),
        prefix_mask=prefix_mask,
        causal_mask=causal if row_len > 1 else None,
        valid=valid,
        written=tokens if valid is None else tokens[valid],
    )
