"""Attention of rows that share a prefix: the prefix is read once for all rows of a group."""

from typing import Protocol, cast

import torch

from mezo_kernels.attention.inputs import AttentionInputs
from mezo_kernels.attention.plan import Indices, SharedPrefixPlan
from mezo_kernels.backends import CPU_NATIVE, REFERENCE, TRITON, load, register, resolve

__all__ = ["AttentionBackend", "AttentionInputs", "SharedPrefixPlan", "shared_prefix_attention"]

_FUNCTION = "shared_prefix_attention"
register(
    _FUNCTION,
    needs={"reference": REFERENCE, "cpu": CPU_NATIVE, "triton": TRITON},
    package=__name__,
)


class AttentionBackend(Protocol):
    """What computes the attention of checked inputs; callers may bring one of their own."""

    def attend(self, inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Write the attention of all rows, and the log-sum-exp where it is asked for."""
        ...


def shared_prefix_attention(
    q: torch.Tensor,
    k_suffix: torch.Tensor,
    v_suffix: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    qo_indptr: Indices | None = None,
    group_indptr: Indices | None = None,
    kv_indptr: Indices | None = None,
    kv_indices: Indices | None = None,
    plan: SharedPrefixPlan | None = None,
    scale: float,
    soft_cap: float = 0.0,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    backend: str | AttentionBackend | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the tokens of rows to the prefix their group shares and to the row so far.

        x[t, l] = cap(scale * q[t] . k[l]),   l in prefix(group of t) and own tokens up to t
        out[t]  = sum_l exp(x[t, l] - lse[t]) v[l],   lse[t] = log sum_l exp(x[t, l])

    Args:
        q: `[T, H, D]` fp32 | fp16 | bf16, tokens of all rows, row after row; head h reads KV head
            h // (H / H_kv). Any strides with the last dim contiguous.
        k_suffix: `[T, H_kv, D]`, keys of the same tokens, dtype and device of ``q``.
        v_suffix: `[T, H_kv, D_v]`, values of the same tokens.
        k_cache: `[slots, H_kv, D]`, keys by slot; only the slots of prefixes are read.
        v_cache: `[slots, H_kv, D_v]`, values by slot.
        qo_indptr: `[R + 1]`, token ranges of the rows; see `SharedPrefixPlan` for these four.
        group_indptr: `[G + 1]`, row ranges of the groups.
        kv_indptr: `[G + 1]`, ranges of ``kv_indices``; an empty one is no prefix.
        kv_indices: slots of each group's prefix.
        plan: a `SharedPrefixPlan` in place of the four, built once for all layers of a batch.
        scale: factor on q . k, e.g. D ** -0.5.
        soft_cap: cap(x) = soft_cap * tanh(x / soft_cap); 0 is none.
        return_lse: also return the log-sum-exp of each token and head.
        out: `[T, H, D_v]` contiguous, dtype and device of ``q``, to write to; None makes one.
        backend: "reference" | "cpu" | "triton" | None (the best one for the device) | an
            `AttentionBackend`: its ``attend(inputs, out, lse)`` gets the checked `AttentionInputs`
            and what to write to.

    Returns:
        `[T, H, D_v]` in the dtype of ``q``, ``out`` where it is given; with ``return_lse`` also
        `[T, H]` fp32 (fp64 from the reference for fp64), natural logarithm.

    Raises:
        ValueError: a wrong rank, shape, dtype, stride or device, a plan beside indices or neither,
            what `SharedPrefixPlan` raises, a negative soft cap, or an unknown backend name.
        IndexError: a slot outside the caches (cpu, reference; the GPU backends do not check).
        NotImplementedError: a head dim above 256; backend "cuda", which is not there.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: scores, softmax and sums in fp32 whatever the dtype; triton rounds the weights to the
    dtype of v before they meet it, as tensor cores ask (the reference computes in the dtype of the
    inputs, fp64 too). A prefix of more than 1024 tokens is attended to in parts of 1024 by triton,
    whatever the batch. Deterministic. Rows of one group with equal contents get the same bits,
    wherever they stand in the group, and a group's result does not depend on the other groups of
    the batch. cpu: a row's bits depend only on the row and its prefix, not on the other rows of
    its group either, and are the same on every instruction set and for every number of threads
    (lse: as far as the C library's log is); weights below exp(-87) of the largest are 0,
    and a token whose scores are all -inf gets 0 and lse -inf. Backends agree within rounding, not
    in bits.
    Graph-safe: triton with a plan that was used once with these shapes and scalars; cpu no. Cost: a
    group's prefix is read once per tile of packed queries, those of its rows and of the heads of a
    KV head: 64 in triton, 48 on the CPU, whose working memory is 0.25 MB a thread.
    Source: Juravsky et al. 2024 (arXiv 2402.05099) for the shared prefix; Milakov and Gimelshein
    2018 (arXiv 1805.02867) for the running softmax.

    Example:
        >>> import mezo_kernels as mk
        >>> cache = torch.randn(8, 1, 4)  # keys and values of 8 slots, one KV head
        >>> q = k = v = torch.randn(3, 1, 4)  # the tokens of two rows, of 2 and of 1
        >>> rows = {"qo_indptr": [0, 2, 3], "group_indptr": [0, 2]}
        >>> prefix = {"kv_indptr": [0, 3], "kv_indices": [5, 0, 2]}  # of both rows
        >>> out = mk.shared_prefix_attention(q, k, v, cache, cache, **rows, **prefix, scale=0.5)
        >>> out.shape
        torch.Size([3, 1, 4])
    """
    name = None
    if backend is None or isinstance(backend, str):
        name = resolve(_FUNCTION, backend, q.device.type)
        backend = cast(AttentionBackend, load(_FUNCTION, name))
    plan = _plan_of(plan, qo_indptr, group_indptr, kv_indptr, kv_indices)
    inputs = AttentionInputs(
        q, k_suffix, v_suffix, k_cache, v_cache, plan, float(scale), float(soft_cap)
    )
    inputs.check(takes_fp64=name == "reference")
    out = _output(inputs, out)
    lse = None
    if return_lse:
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(q.shape[:2], dtype=lse_dtype, device=q.device)
    backend.attend(inputs, out, lse)
    return out if lse is None else (out, lse)


def _plan_of(plan: SharedPrefixPlan | None, *indices: Indices | None) -> SharedPrefixPlan:
    qo_indptr, group_indptr, kv_indptr, kv_indices = indices
    if plan is not None:
        if any(index is not None for index in indices):
            raise ValueError(
                f"{_FUNCTION}: the four index arguments must be None beside a plan, got both; they "
                "are part of the plan."
            )
        return plan
    if qo_indptr is None or group_indptr is None or kv_indptr is None or kv_indices is None:
        raise ValueError(
            f"{_FUNCTION}: qo_indptr, group_indptr, kv_indptr and kv_indices must all be given "
            "where there is no plan, got None among them; pass them, or a SharedPrefixPlan."
        )
    return SharedPrefixPlan(qo_indptr, group_indptr, kv_indptr, kv_indices)


def _output(inputs: AttentionInputs, out: torch.Tensor | None) -> torch.Tensor:
    q = inputs.q
    shape = (*q.shape[:2], inputs.v_suffix.shape[-1])
    if out is None:
        return torch.empty(shape, dtype=q.dtype, device=q.device)
    if out.shape != shape or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(
            f"{_FUNCTION}: out must be {shape} {q.dtype} on {q.device}, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}; pass None to have it made."
        )
    if not out.is_contiguous():
        raise ValueError(
            f"{_FUNCTION}: out must be contiguous, got stride {out.stride()}; pass a tensor of its "
            "own, or None."
        )
    return out
