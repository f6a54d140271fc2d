"""The attention kernels that `bench.paired` compares on a GPU, of other packages and ours."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from bench.paired_cases import COPIES_LIMIT, Attention
from bench.timing import Call

LABELS = {
    "sglang_triton": "SGLang triton, prefix per row",
    "flashinfer_per_row": "FlashInfer, prefix per row",
    "sdpa": "SDPA, prefix per row",
    "two_pass": "two passes (SGLang triton, merge_state)",
    "flashinfer": "flashinfer (paged + ragged, merge_state)",
    "triton": "triton (ours)",
}
NOT_SHARING = ("sglang_triton", "flashinfer_per_row", "sdpa")


def sglang_triton(one: Attention) -> Call:
    from bench.experiments.attention.two_pass import prefix_per_row

    options = {"plan": one.plan, "scale": one.scale, "out": one.out}
    return lambda: prefix_per_row(*one.tensors, **options)


def two_pass(one: Attention) -> Call:
    from bench.experiments.attention.two_pass import two_pass_attention

    options = {"plan": one.plan, "scale": one.scale, "out": one.out}
    return lambda: two_pass_attention(*one.tensors, **options)


def flashinfer_attention(one: Attention) -> Call:
    from bench.experiments.attention import flashinfer as backend

    return lambda: one.ours(backend)


def flashinfer_per_row(one: Attention) -> Call:
    """FlashInfer's paged prefill over a cache that holds the rows' own tokens, too."""
    from bench.experiments.attention import flashinfer as backend

    reason = backend.reason_against(one.q.device.type)
    if reason is not None:
        raise RuntimeError(reason)
    import flashinfer

    first_own, rows = len(one.k_cache), one.rows()
    own = (torch.arange(r.start, r.stop, device=one.q.device) + first_own for _, r in rows)
    indices = [torch.cat((slots, mine)) for (slots, _), mine in zip(rows, own, strict=True)]
    caches = ((one.k_cache, one.k_suffix), (one.v_cache, one.v_suffix))
    cache = tuple(torch.cat(parts).unsqueeze(1) for parts in caches)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(backend.workspace(one.q.device), "NHD")
    case = one.case
    wrapper.plan(
        qo_indptr=torch.tensor(one.plan.qo_indptr, dtype=torch.int32),
        paged_kv_indptr=torch.tensor([0, *accumulate(map(len, indices))], dtype=torch.int32),
        paged_kv_indices=torch.cat(indices).int(),
        paged_kv_last_page_len=torch.ones(len(rows), dtype=torch.int32),
        num_qo_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim_qk=case.dim,
        page_size=1,
        causal=True,
        sm_scale=one.scale,
        q_data_type=one.q.dtype,
        kv_data_type=one.q.dtype,
    )
    return lambda: wrapper.run(one.q, cache, out=one.out)


def sdpa(one: Attention) -> Call:
    if one.case.copies_nbytes > COPIES_LIMIT:
        raise RuntimeError(f"copies of the prefix for each row exceed {COPIES_LIMIT >> 30} GiB.")
    return one.batched_rows()


KERNELS: dict[str, Callable[[Attention], Call]] = {
    "sglang_triton": sglang_triton,
    "flashinfer_per_row": flashinfer_per_row,
    "sdpa": sdpa,
    "two_pass": two_pass,
    "flashinfer": flashinfer_attention,
    "triton": lambda one: lambda: one.ours("triton"),
}
