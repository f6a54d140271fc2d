"""Attention of rows that share a prefix in two passes of SGLang's own kernels.

SGLang's triton attention runs twice, over the prefixes and over the rows' own tokens, and its
`merge_state` merges the two results. SGLang can do this without a kernel of ours: it checks ours in
tests, and it is the attention kernel to beat in `python -m bench.paired`. It stays here until it
wins a measured shape.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from bench.experiments.attention.cascade import cascade_of
from mezo_kernels import SharedPrefixPlan, shared_prefix_attention
from mezo_kernels._per_plan import per_plan
from mezo_kernels.attention import AttentionInputs

_FUNCTION = "two_pass_attention"


@dataclass(frozen=True)
class _Sequences:
    """A batch of sequences as SGLang's kernel expects it, on the device of a call."""

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    longest: int


@dataclass(frozen=True)
class _Tables:
    """The two passes of a plan, made at its first call."""

    groups: _Sequences
    rows: _Sequences
    num_shared: int
    order: torch.Tensor | None  # None where the tokens stand in it already
    places: torch.Tensor | None  # the inverse of `order`


class TwoPass:
    """A backend of `shared_prefix_attention`: two launches of SGLang's kernel, and its merge.

        out = merge_state(attention(group's tokens, prefix), causal attention(row's tokens, row))

    Raises:
        ValueError: a scale of 0.
        RuntimeError: there is no SGLang, or one that cannot attend to a prefix and to new tokens
            apart.

    Numerics: scores and softmax in fp32; fp32 products are TF32 on a GPU, as SGLang's kernel makes
    them. Both results are rounded to the dtype of ``q`` before they are merged, so 16-bit results
    carry up to three roundings. Deterministic. Prefixes are not split, so few groups with long ones
    leave most of a GPU idle.
    Graph-safe: yes, with a plan that was used once. Cost: a group's prefix is read once for each
    tile of its tokens and head of q (heads are not packed); two attention launches and a merge.
    """

    def attend(self, inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Write the attention of all rows, and the log-sum-exp where it is asked for."""
        tables = _tables(inputs.plan, out.device)
        if tables.order is not None:
            q, k, v = (t[tables.order] for t in (inputs.q, inputs.k_suffix, inputs.v_suffix))
            inputs = dataclasses.replace(inputs, q=q, k_suffix=k, v_suffix=v)
        packed = out if tables.places is None else torch.empty_like(out)
        packed_lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        # Triton launches on the current device.
        with torch.cuda.device_of(out):
            _extend(inputs, packed, tables.rows, lse=packed_lse, skip_prefix=True)
            if tables.num_shared:
                shared = slice(tables.num_shared)
                prefix_out = torch.empty_like(packed[shared])
                prefix_lse = torch.empty_like(packed_lse[shared])
                _extend(
                    dataclasses.replace(inputs, q=inputs.q[shared]),
                    prefix_out,
                    tables.groups,
                    lse=prefix_lse,
                    skip_extend=True,
                )
                # The merged values may go where the second half was: only its writer reads each
                # of them. The LSE may not: several threads of a head read it.
                _, merged_lse = _merge()(
                    prefix_out, prefix_lse, packed[shared], packed_lse[shared], packed[shared]
                )
                if lse is not None:
                    packed_lse[shared] = merged_lse
        if tables.places is not None:
            torch.index_select(packed, 0, tables.places, out=out)
        if lse is not None:
            lse.copy_(packed_lse if tables.places is None else packed_lse[tables.places])


class PrefixPerRow:
    """One launch, as SGLang's triton backend extends a batch: every row reads its prefix itself.

    A backend of `shared_prefix_attention` for comparison.
    """

    def attend(self, inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Write the attention of all rows, and the log-sum-exp where it is asked for."""
        rows = _rows_with_prefix(inputs.plan, out.device)
        with torch.cuda.device_of(out):
            _extend(inputs, out, rows, lse=lse)


two_pass_attention = functools.partial(shared_prefix_attention, backend=TwoPass())
prefix_per_row = functools.partial(shared_prefix_attention, backend=PrefixPerRow())


def _extend(
    inputs: AttentionInputs,
    out: torch.Tensor,
    sequences: _Sequences,
    *,
    lse: torch.Tensor | None,
    skip_prefix: bool = False,
    skip_extend: bool = False,
) -> None:
    """One launch of SGLang's kernel over a batch of sequences; an empty batch is none."""
    kernel = _kernel()
    if not inputs.scale:
        raise ValueError(
            f"{_FUNCTION}: scale must not be 0, which SGLang reads as D ** -0.5, got "
            f"{inputs.scale}; pass the factor on q . k."
        )
    if not sequences.longest:
        return
    kernel(
        inputs.q,
        inputs.k_suffix,
        inputs.v_suffix,
        out,
        inputs.k_cache,
        inputs.v_cache,
        sequences.qo_indptr,
        sequences.kv_indptr,
        sequences.kv_indices,
        custom_mask=None,
        is_causal=not skip_extend,
        mask_indptr=None,
        max_len_extend=sequences.longest,
        k_scale=1.0,
        v_scale=1.0,
        sm_scale=inputs.scale,
        logit_cap=inputs.soft_cap,
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
        # 0.5.17 needs a compiled kernel there, which CPU hosts do not have.
        from sglang.kernels.ops.attention.merge_state import merge_state_triton as merge
    found: Callable[..., Any] = merge
    return found


@per_plan
def _tables(plan: SharedPrefixPlan, device: torch.device) -> _Tables:
    cascade = cascade_of(plan)
    order = None if cascade.token_order is None else torch.tensor(cascade.token_order)
    nothing = [0] * len(cascade.row_indptr)
    slots = cascade.kv_indices.to(device)
    return _Tables(
        _sequences(cascade.group_indptr, cascade.kv_indptr, slots, cascade.longest_group),
        _sequences(cascade.row_indptr, nothing, slots, cascade.longest_row),
        cascade.num_shared,
        None if order is None else order.to(device),
        None if order is None else order.argsort().to(device),
    )


@per_plan
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
