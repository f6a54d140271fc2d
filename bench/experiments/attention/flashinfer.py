"""Attention by FlashInfer's prefill kernels over prefixes and rows, merged by LSE.

This module is a backend object of `shared_prefix_attention`. It stays here until it wins a measured
shape. It splits prefixes by the whole batch, so that a row's bits depend on the other rows, and it
rounds both results to the dtype of q before it merges them. Calls on one device share a workspace:
keep them on one stream.

FlashInfer's `MultiLevelCascadeAttentionWrapper` does the same with all keys in a paged cache. Here
the keys and values of a row's own tokens are contiguous and in no cache, so the second pass is the
ragged wrapper; the first pass and `merge_state_in_place` are as in FlashInfer.

Names and arguments are those of FlashInfer 0.7.2, keywords throughout.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from bench.experiments.attention.cascade import Cascade, cascade_of
from mezo_kernels import SharedPrefixPlan
from mezo_kernels._per_plan import per_plan
from mezo_kernels.attention import AttentionInputs

_FUNCTION = "shared_prefix_attention"
_PAGED, _RAGGED = "BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper"
# merge_state_in_place is compiled for these, and for no fp32.
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
# What FlashInfer recommends; it holds partial results of split prefixes.
WORKSPACE_BYTES = 128 << 20
_LN_2 = math.log(2.0)


@dataclass(frozen=True)
class _Shape:
    """What a wrapper is planned for beside the indices; the fields have FlashInfer's names."""

    device: torch.device
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    sm_scale: float
    logits_soft_cap: float
    q_data_type: torch.dtype
    kv_data_type: torch.dtype

    def arguments(self) -> dict[str, Any]:
        """All but the device, as both wrappers expect them."""
        return {name: value for name, value in vars(self).items() if name != "device"}


@dataclass(frozen=True)
class Tables:
    """The planned wrappers of a plan and shape."""

    prefix: Any  # None where no token has a prefix
    own: Any  # None where there is no token
    num_shared: int
    token_order: torch.Tensor | None  # None where the tokens stand in it already


def reason_against(device_type: str) -> str | None:
    """Why this backend cannot attend on a kind of device here, or None."""
    if device_type != "cuda":
        return f"It does not work on {device_type} tensors."
    try:
        package = _package()
    except ImportError as error:
        return (
            f"The package flashinfer does not import ({error}); install it with "
            "`pip install flashinfer-python`."
        )
    missing = [n for n in (_PAGED, _RAGGED, "merge_state_in_place") if not hasattr(package, n)]
    return f"The package flashinfer has no {' and no '.join(missing)}." if missing else None


def attend(inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Write the attention of all rows, and the log-sum-exp where it is asked for.

    Raises:
        NotImplementedError: a head dim but 64, 128 and 256, or two of them, or fp32.
        RuntimeError: it is not usable here, with the reason.

    Graph-safe: with a plan that was used once with these shapes and scalars.
    """
    _check(inputs)
    tables = _tables(inputs.plan, _shape_of(inputs))
    if tables.own is None:
        return
    order = tables.token_order
    q, k_suffix, v_suffix = (
        t if order is None else t[order] for t in (inputs.q, inputs.k_suffix, inputs.v_suffix)
    )
    packed = out if order is None else torch.empty_like(out)
    lse2 = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(out):
        tables.own.run(q, k_suffix, v_suffix, out=packed, lse=lse2, return_lse=True)
        if tables.prefix is not None:
            shared = slice(tables.num_shared)
            # [slots, page of 1, H_kv, D]
            cache = (inputs.k_cache.unsqueeze(1), inputs.v_cache.unsqueeze(1))
            prefix_out, prefix_lse2 = (
                torch.empty_like(packed[shared]),
                torch.empty_like(lse2[shared]),
            )
            tables.prefix.run(q[shared], cache, out=prefix_out, lse=prefix_lse2, return_lse=True)
            _merge_in_place(packed[shared], lse2[shared], prefix_out, prefix_lse2)
    lse_packed = None if lse is None else lse2 * _LN_2
    if order is not None:
        out[order] = packed
    if lse is not None and lse_packed is not None:
        lse[slice(None) if order is None else order] = lse_packed


def _shape_of(inputs: AttentionInputs) -> _Shape:
    return _Shape(
        device=inputs.q.device,
        num_qo_heads=inputs.q.shape[1],
        num_kv_heads=inputs.num_kv_heads,
        head_dim_qk=inputs.q.shape[-1],
        head_dim_vo=inputs.v_suffix.shape[-1],
        sm_scale=inputs.scale,
        logits_soft_cap=inputs.soft_cap,
        q_data_type=inputs.q.dtype,
        kv_data_type=inputs.q.dtype,
    )


def _merge_in_place(
    out: torch.Tensor, lse2: torch.Tensor, other: torch.Tensor, other_lse2: torch.Tensor
) -> None:
    """FlashInfer's merge, with the heads cut so that those of a token fit a block of threads."""
    heads, dim = out.shape[1:]
    # A thread computes 8 elements of a head, or a 32nd of one.
    threads_of_head = dim // max(8, dim // 32)
    heads = math.gcd(heads, 1024 // threads_of_head)
    _package().merge_state_in_place(
        out.view(-1, heads, dim),
        lse2.view(-1, heads),
        other.view(-1, heads, dim),
        other_lse2.view(-1, heads),
    )


def _check(inputs: AttentionInputs) -> None:
    reason = reason_against(inputs.q.device.type)
    if reason is not None:
        raise RuntimeError(f"{_FUNCTION}: backend 'flashinfer' is not usable here: {reason}")
    dim, v_dim, dtype = inputs.q.shape[-1], inputs.v_suffix.shape[-1], inputs.q.dtype
    if dim != v_dim or dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"{_FUNCTION}: head dims must be one of {list(HEAD_DIMS)} and equal for backend "
            f"'flashinfer', got {dim} and {v_dim}; use 'triton'."
        )
    if dtype not in DTYPES:
        raise NotImplementedError(
            f"{_FUNCTION}: dtypes must be one of {[str(d) for d in DTYPES]} for backend "
            f"'flashinfer', got {dtype}; use 'triton'."
        )


@per_plan
def _tables(plan: SharedPrefixPlan, shape: _Shape) -> Tables:
    """The wrappers of a plan, planned at its first call with this shape."""
    cascade = cascade_of(plan)
    order = cascade.token_order
    return Tables(
        _plan_prefix(shape, cascade) if cascade.num_shared else None,
        _plan_own(shape, cascade.row_indptr) if cascade.longest_row else None,
        cascade.num_shared,
        None if order is None else torch.tensor(order, device=shape.device),
    )


def _plan_prefix(shape: _Shape, cascade: Cascade) -> Any:
    """Groups as sequences over pages of one token; every query sees its whole prefix."""
    wrapper = getattr(_package(), _PAGED)(workspace(shape.device), "NHD")
    wrapper.plan(
        qo_indptr=_int32(cascade.group_indptr),
        paged_kv_indptr=_int32(cascade.kv_indptr),
        paged_kv_indices=cascade.kv_indices.to(shape.device, torch.int32),
        paged_kv_last_page_len=torch.ones(len(cascade.kv_indptr) - 1, dtype=torch.int32),
        page_size=1,
        causal=False,
        **shape.arguments(),
    )
    return wrapper


def _plan_own(shape: _Shape, row_indptr: list[int]) -> Any:
    """Rows as sequences over themselves."""
    device = shape.device
    backend = "auto"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 12:
        # There the automatic choice may be a kernel that returns no LSE.
        backend = "fa2"
    wrapper = getattr(_package(), _RAGGED)(workspace(device), "NHD", backend=backend)
    indptr = _int32(row_indptr)
    wrapper.plan(qo_indptr=indptr, kv_indptr=indptr, causal=True, **shape.arguments())
    return wrapper


def _int32(indptr: list[int]) -> torch.Tensor:
    """On the host, where planning reads it."""
    return torch.tensor(indptr, dtype=torch.int32)


# Calls on a device follow one another on one stream, so one buffer serves all plans.
@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """Scratch of all wrappers of a device."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _package() -> Any:
    # Imported at the first use: importing it is slow, and it is not always there.
    import flashinfer

    return flashinfer
