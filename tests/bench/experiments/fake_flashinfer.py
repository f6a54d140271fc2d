"""The part of FlashInfer that the flashinfer backend uses, in plain torch on any device.

Signatures are those of flashinfer-python 0.7.2.post1 (`prefill.py`, `cascade.py`), cut to the
arguments in use; what the real kernels leave undefined or refuse is an error here: sequences
without keys or queries, index tensors that are not int32, a wrapper that runs before it is planned.
LSE is in base 2, as there.
"""

from __future__ import annotations

from itertools import pairwise

import torch

LOG2_E = 1.4426950408889634
plans: list[str] = []


class _Wrapper:
    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", backend: str = "auto"
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        assert backend in ("auto", "fa2")
        self.layout: dict[str, object] | None = None

    def _plan(self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, **layout: object) -> None:
        plans.append(type(self).__name__)
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(kv_indptr) > 1
        for indptr in (qo_indptr, kv_indptr):
            assert indptr[0] == 0
            assert (indptr.diff() > 0).all()
        self.layout = {"qo": qo_indptr.tolist(), "kv": kv_indptr.tolist(), **layout}

    def _run(self, q, keys_of, *, out, lse, return_lse):
        layout = self.layout
        assert layout is not None, "planned first"
        assert return_lse == (lse is not None)
        assert q.dtype == layout["q_data_type"] == layout["kv_data_type"]
        assert q.shape[1:] == (layout["num_qo_heads"], layout["head_dim_qk"])
        assert len(q) == layout["qo"][-1]
        assert out.shape == (*q.shape[:2], layout["head_dim_vo"] or layout["head_dim_qk"])
        assert out.is_contiguous()
        if lse is not None:
            assert lse.shape == q.shape[:2]
            assert lse.dtype == torch.float32
        ranges = zip(pairwise(layout["qo"]), pairwise(layout["kv"]), strict=True)
        for (start, stop), keys in ranges:
            k, v = keys_of(*keys)
            assert k.shape[1:] == (layout["num_kv_heads"], layout["head_dim_qk"])
            groups = layout["num_qo_heads"] // layout["num_kv_heads"]
            k, v = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
            scores = torch.einsum("shd,lhd->shl", q[start:stop].float(), k) * layout["sm_scale"]
            cap = layout["logits_soft_cap"]
            if cap:
                scores = cap * torch.tanh(scores / cap)
            if layout["causal"]:
                seen = torch.ones(stop - start, len(k), dtype=torch.bool).tril(
                    len(k) - stop + start
                )
                scores = scores.masked_fill(~seen[:, None].to(q.device), -torch.inf)
            out[start:stop] = torch.einsum("shl,lhd->shd", scores.softmax(-1), v).to(q.dtype)
            if lse is not None:
                lse[start:stop] = scores.logsumexp(-1) * LOG2_E
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        causal=False,
        sm_scale=None,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
        assert paged_kv_indices.dtype == paged_kv_last_page_len.dtype == torch.int32
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert page_size == 1
        assert paged_kv_last_page_len.tolist() == [1] * (len(qo_indptr) - 1)
        self.indices = paged_kv_indices.long()
        self._plan(
            qo_indptr,
            paged_kv_indptr,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            causal=causal,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )

    def run(self, q, paged_kv_cache, *, out=None, lse=None, return_lse=False):
        k_cache, v_cache = paged_kv_cache
        assert k_cache.shape[1] == v_cache.shape[1] == 1

        def keys_of(start: int, stop: int):
            slots = self.indices[start:stop]
            return k_cache[slots, 0], v_cache[slots, 0]

        return self._run(q, keys_of, out=out, lse=lse, return_lse=return_lse)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo=None,
        causal=False,
        logits_soft_cap=None,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
        self._plan(
            qo_indptr,
            kv_indptr,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            causal=causal,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )

    def run(self, q, k, v, *, out=None, lse=None, return_lse=False):
        assert len(k) == len(v) == self.layout["kv"][-1]

        def keys_of(start: int, stop: int):
            return k[start:stop], v[start:stop]

        return self._run(q, keys_of, out=out, lse=lse, return_lse=return_lse)


def merge_state_in_place(v, s, v_other, s_other, mask=None) -> None:
    assert mask is None
    assert v.shape == v_other.shape
    assert s.shape == s_other.shape == v.shape[:2]
    assert s.dtype == s_other.dtype == torch.float32
    assert v.dtype in (torch.float16, torch.bfloat16)
    # A block of threads holds the heads of a row, 16 bytes of a head or a 32nd of it a thread.
    heads, dim = v.shape[1:]
    assert heads * dim // max(8, dim // 32) <= 1024
    largest = torch.maximum(s, s_other)
    mine, theirs = torch.exp2(s - largest), torch.exp2(s_other - largest)
    total = mine + theirs
    merged = v.float() * (mine / total)[..., None] + v_other.float() * (theirs / total)[..., None]
    v.copy_(merged.to(v.dtype))
    s.copy_(total.log2() + largest)
