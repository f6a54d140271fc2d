"""Attention of rows that share a prefix, composed of SGLang's own kernels.

SGLang's triton attention runs twice, over the prefixes and over the rows' own tokens, and its
`merge_state` joins the halves. It is what SGLang can do without a kernel of ours: a second opinion
in tests, and the form to beat in `python -m bench.paired`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from mezo_kernels import SharedPrefixPlan

_FUNCTION = "composed_attention"


@dataclass(frozen=True)
class _Sequences:
    """A batch of sequences as SGLang's kernel takes it, on the device of a call."""

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    longest: int


@dataclass(frozen=True)
class _Tables:
    """What a plan comes to for this form, made at its first call."""

    groups: _Sequences
    rows: _Sequences
    num_shared: int
    order: torch.Tensor | None  # None where the tokens stand in it already
    places: torch.Tensor | None  # the inverse of `order`


def composed_attention(
    q: torch.Tensor,
    k_suffix: torch.Tensor,
    v_suffix: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    plan: SharedPrefixPlan,
    scale: float,
    soft_cap: float = 0.0,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the tokens of rows to the prefix their group shares and to the row so far.

        out = merge_state(attention(group's tokens, prefix), causal attention(row's tokens, row))

    Args:
        q: `[T, H, D]` fp32 | fp16 | bf16, tokens of all rows; as in `shared_prefix_attention`, like
            everything that follows.
        k_suffix: `[T, H_kv, D]`.
        v_suffix: `[T, H_kv, D_v]`.
        k_cache: `[slots, H_kv, D]`, keys by slot.
        v_cache: `[slots, H_kv, D_v]`, values by slot.
        plan: which rows share which prefix.
        scale: factor on q . k, not 0.
        soft_cap: cap(x) = soft_cap * tanh(x / soft_cap); 0 is none.
        return_lse: also return the log-sum-exp of each token and head.
        out: `[T, H, D_v]` contiguous, dtype and device of ``q``, to write to; None makes one.

    Returns:
        `[T, H, D_v]` in the dtype of ``q``; with ``return_lse`` also `[T, H]` fp32, natural
        logarithm.

    Raises:
        ValueError: tensors that do not fit the plan or each other, or a scale of 0.
        RuntimeError: there is no SGLang, or one that cannot attend to a prefix and to new tokens
            apart.

    Numerics: scores and softmax in fp32; fp32 products are TF32 on a GPU, as SGLang's kernel makes
    them. Both halves are rounded to the dtype of ``q`` before they are merged, so 16-bit results
    carry up to three roundings. Deterministic. Prefixes are not split, so few groups with long ones
    leave most of a GPU idle.
    Graph-safe: yes, with a plan that was used once. Cost: a group's prefix is read once for each
    tile of its tokens and head of q (heads are not packed); two attention launches and a merge.
    """
    _check(q, k_suffix, v_suffix, k_cache, v_cache, plan, scale)
    out = _output(q, v_suffix, out)
    tables = _tables(plan, q.device)
    if tables.order is not None:
        q, k_suffix, v_suffix = (t[tables.order] for t in (q, k_suffix, v_suffix))
    new, cache, scores = (k_suffix, v_suffix), (k_cache, v_cache), (scale, soft_cap)
    packed = out if tables.places is None else torch.empty_like(out)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    # Triton launches on the current device.
    with torch.cuda.device_of(out):
        _extend(q, new, packed, cache, tables.rows, *scores, lse=lse, skip_prefix=True)
        if tables.num_shared:
            shared = slice(tables.num_shared)
            prefix_out, prefix_lse = torch.empty_like(packed[shared]), torch.empty_like(lse[shared])
            _extend(
                q[shared],
                new,
                prefix_out,
                cache,
                tables.groups,
                *scores,
                lse=prefix_lse,
                skip_extend=True,
            )
            # The merged values may go where the second half was: each is read by its writer alone.
            # The LSE may not, several threads of a head read it.
            _, merged_lse = _merge()(
                prefix_out, prefix_lse, packed[shared], lse[shared], packed[shared]
            )
            if return_lse:
                lse[shared] = merged_lse
    if tables.places is not None:
        torch.index_select(packed, 0, tables.places, out=out)
        lse = lse[tables.places] if return_lse else lse
    return (out, lse) if return_lse else out


def prefix_per_row(
    q: torch.Tensor,
    k_suffix: torch.Tensor,
    v_suffix: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    plan: SharedPrefixPlan,
    scale: float,
    soft_cap: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in one launch, as SGLang's triton backend extends a batch: no prefix is shared.

    Arguments and result as for `composed_attention`; each row reads the prefix for itself. For
    comparison.
    """
    _check(q, k_suffix, v_suffix, k_cache, v_cache, plan, scale)
    out = _output(q, v_suffix, out)
    key = ("sglang", "prefix_per_row", q.device)
    rows = plan.tables.get(key)
    if rows is None:
        rows = plan.tables[key] = _rows_with_prefix(plan, q.device)
    assert isinstance(rows, _Sequences)
    with torch.cuda.device_of(out):
        cache = (k_cache, v_cache)
        _extend(q, (k_suffix, v_suffix), out, cache, rows, scale, soft_cap)
    return out


def _extend(
    q: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    sequences: _Sequences,
    scale: float,
    soft_cap: float,
    *,
    lse: torch.Tensor | None = None,
    skip_prefix: bool = False,
    skip_extend: bool = False,
) -> None:
    """One launch of SGLang's kernel over a batch of sequences; an empty batch is none."""
    if not sequences.longest:
        return
    _kernel()(
        q,
        *new,
        out,
        *cache,
        sequences.qo_indptr,
        sequences.kv_indptr,
        sequences.kv_indices,
        custom_mask=None,
        is_causal=not skip_extend,
        mask_indptr=None,
        max_len_extend=sequences.longest,
        k_scale=1.0,
        v_scale=1.0,
        sm_scale=scale,
        logit_cap=soft_cap,
        lse_extend=lse,
        skip_prefix=skip_prefix,
        skip_extend=skip_extend,
    )


@functools.cache
def _kernel() -> Callable[..., Any]:
    """SGLang's `extend_attention_fwd`."""
    try:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    except ImportError as error:
        raise RuntimeError(
            f"{_FUNCTION}: SGLang's extend_attention_fwd must be there to import, got {error}; use "
            "SGLang 0.5.17 to 0.5.23."
        ) from error
    missing = {"lse_extend", "skip_prefix", "skip_extend"} - set(
        inspect.signature(extend_attention_fwd).parameters
    )
    if missing:
        raise RuntimeError(
            f"{_FUNCTION}: SGLang's extend_attention_fwd must take lse_extend, skip_prefix and "
            f"skip_extend, got one without {', '.join(sorted(missing))}; use SGLang 0.5.17 to "
            "0.5.23."
        )
    kernel: Callable[..., Any] = extend_attention_fwd
    return kernel


@functools.cache
def _merge() -> Callable[..., Any]:
    """SGLang's `merge_state`, which speaks natural logarithms."""
    try:
        from sglang.srt.layers.attention.merge_state import merge_state as merge
    except ImportError:
        # 0.5.17 asks for a compiled form there, which CPU hosts do not have.
        from sglang.kernels.ops.attention.merge_state import merge_state_triton as merge
    found: Callable[..., Any] = merge
    return found


def _tables(plan: SharedPrefixPlan, device: torch.device) -> _Tables:
    key = ("sglang", "composed", device)
    found = plan.tables.get(key)
    if found is None:
        levels = plan.levels()
        order = None if levels.token_order is None else torch.tensor(levels.token_order)
        nothing = [0] * len(levels.row_indptr)
        slots = levels.kv_indices.to(device)
        found = plan.tables[key] = _Tables(
            _sequences(levels.group_indptr, levels.kv_indptr, slots, levels.longest_group),
            _sequences(levels.row_indptr, nothing, slots, levels.longest_row),
            levels.num_shared,
            None if order is None else order.to(device),
            None if order is None else order.argsort().to(device),
        )
    assert isinstance(found, _Tables)
    return found


def _rows_with_prefix(plan: SharedPrefixPlan, device: torch.device) -> _Sequences:
    slots = plan.kv_indices.new_empty(0)
    prefixes = [slots] * plan.num_rows
    for group in range(plan.num_groups):
        for row in plan.group_rows(group):
            prefixes[row] = plan.prefix_slots(group)
    return _sequences(
        plan.qo_indptr,
        [0, *accumulate(len(prefix) for prefix in prefixes)],
        torch.cat([slots, *prefixes]).to(device),
        max((len(plan.row_tokens(row)) for row in range(plan.num_rows)), default=0),
    )


def _sequences(
    qo_indptr: list[int], kv_indptr: list[int], kv_indices: torch.Tensor, longest: int
) -> _Sequences:
    def on_device(indptr: list[int]) -> torch.Tensor:
        return torch.tensor(indptr, dtype=torch.int32, device=kv_indices.device)

    return _Sequences(on_device(qo_indptr), on_device(kv_indptr), kv_indices, longest)


def _output(q: torch.Tensor, v_suffix: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    shape = (*q.shape[:2], v_suffix.shape[-1])
    if out is None:
        return torch.empty(shape, dtype=q.dtype, device=q.device)
    if out.shape != shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(
            f"{_FUNCTION}: out must be contiguous {shape} {q.dtype}, got {tuple(out.shape)} "
            f"{out.dtype} stride {out.stride()}; pass None to have it made."
        )
    return out


def _check(
    q: torch.Tensor,
    k_suffix: torch.Tensor,
    v_suffix: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: SharedPrefixPlan,
    scale: float,
) -> None:
    """Refuse what SGLang's kernel would read out of bounds or take for something else."""
    tokens, heads, dim = q.shape
    kv_heads, v_dim = v_suffix.shape[1:]
    expected = {
        "q": (plan.num_tokens, heads, dim),
        "k_suffix": (tokens, kv_heads, dim),
        "v_suffix": (tokens, kv_heads, v_dim),
        "k_cache": (len(k_cache), kv_heads, dim),
        "v_cache": (len(k_cache), kv_heads, v_dim),
    }
    got = (q, k_suffix, v_suffix, k_cache, v_cache)
    for (name, shape), tensor in zip(expected.items(), got, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != q.dtype or tensor.stride(-1) != 1:
            raise ValueError(
                f"{_FUNCTION}: {name} must be {shape} {q.dtype} with stride(-1) == 1 by the plan, "
                f"q and v_suffix, got {tuple(tensor.shape)} {tensor.dtype} stride "
                f"{tensor.stride()}; pass the tensors of one layer and its plan."
            )
    if heads % kv_heads:
        raise ValueError(
            f"{_FUNCTION}: the heads of q must be a multiple of the KV heads, got {heads} and "
            f"{kv_heads}; pass whole groups of heads to each rank."
        )
    if not scale:
        raise ValueError(
            f"{_FUNCTION}: scale must not be 0, which SGLang reads as D ** -0.5, got {scale}; pass "
            "the factor on q . k."
        )
