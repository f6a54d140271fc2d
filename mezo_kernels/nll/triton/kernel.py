"""Device code: tiles of logits, the running log-sum-exp over them, the merge of its parts."""

import triton
import triton.language as tl

# One binary whatever the number of rows: a specialised one could round differently.
JIT = triton.jit(do_not_specialize=["T"])


@triton.jit
def _logits_tile(
    hidden_ptr,
    lm_head_ptr,
    bias_ptr,
    stride_hidden,
    stride_lm_head,
    offs_t,
    offs_v,
    T,
    V,
    D,
    logit_scale,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[BLOCK_T, BLOCK_V]` fp32 logits, -inf beyond V."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_t, mask_v = offs_t < T, offs_v < V
    hidden_ptrs = hidden_ptr + offs_t.to(tl.int64)[:, None] * stride_hidden + offs_k[None, :]
    lm_head_ptrs = lm_head_ptr + offs_v.to(tl.int64)[None, :] * stride_lm_head + offs_k[:, None]
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        mask_k = offs_k < D - k
        hidden = tl.load(hidden_ptrs + k, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(lm_head_ptrs + k, mask=mask_k[:, None] & mask_v[None, :], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        logits += bias[None, :]
    logits *= logit_scale
    if HAS_CAP:
        # tanh by exp: 1 - 2 / (1 + e^2x) reaches -1 and 1 without overflow trouble.
        logits = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / soft_cap)))
    return tl.where(mask_v[None, :], logits, -float("inf"))


@JIT
def label_nll_kernel(
    hidden_ptr,
    lm_head_ptr,
    bias_ptr,
    targets_ptr,
    parts_ptr,
    stride_hidden,
    stride_lm_head,
    T,
    V,
    D,
    vocab_start,
    tiles_per_split,
    logit_scale,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write (max, sum_exp, target_logit) of one block of rows over one share of the vocabulary."""
    # Blocks of rows are the fast axis: those of one vocabulary share read it from L2.
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    local = tl.load(targets_ptr + offs_t, mask=offs_t < T, other=-1) - vocab_start
    maximum = tl.full((BLOCK_T,), -float("inf"), dtype=tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), dtype=tl.float32)
    target_logit = tl.full((BLOCK_T,), -float("inf"), dtype=tl.float32)
    first = split * tiles_per_split * BLOCK_V
    for start in range(first, min(V, first + tiles_per_split * BLOCK_V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = _logits_tile(
            hidden_ptr,
            lm_head_ptr,
            bias_ptr,
            stride_hidden,
            stride_lm_head,
            offs_t,
            offs_v,
            T,
            V,
            D,
            logit_scale,
            soft_cap,
            HAS_BIAS,
            HAS_CAP,
            BLOCK_T,
            BLOCK_V,
            BLOCK_K,
        )
        is_target = offs_v[None, :] == local[:, None]
        picked = tl.max(tl.where(is_target, logits, -float("inf")), axis=1)
        target_logit = tl.maximum(target_logit, picked)
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        # A row of only -inf keeps sum 0 instead of NaN.
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        sum_exp = sum_exp * tl.exp(maximum - shift)
        sum_exp += tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        maximum = new_maximum
    # [3, splits, T]
    num_splits = tl.num_programs(1)
    out_ptrs = parts_ptr + split.to(tl.int64) * T + offs_t
    stride_part = num_splits.to(tl.int64) * T
    tl.store(out_ptrs, maximum, mask=offs_t < T)
    tl.store(out_ptrs + stride_part, sum_exp, mask=offs_t < T)
    tl.store(out_ptrs + 2 * stride_part, target_logit, mask=offs_t < T)


@JIT
def merge_parts_kernel(
    parts_ptr, merged_ptr, T, num_splits, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Merge the shares of the vocabulary, `BLOCK_S` at a time: one by one each waits for memory."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    maximum = tl.full((BLOCK_T,), -float("inf"), dtype=tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), dtype=tl.float32)
    target_logit = tl.full((BLOCK_T,), -float("inf"), dtype=tl.float32)
    stride_part = num_splits.to(tl.int64) * T
    for first in range(0, num_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        ptrs = parts_ptr + split.to(tl.int64)[:, None] * T + offs_t[None, :]
        mask = (split < num_splits)[:, None] & mask_t[None, :]
        other = tl.load(ptrs, mask=mask, other=-float("inf"))
        other_sum = tl.load(ptrs + stride_part, mask=mask, other=0.0)
        other_logit = tl.load(ptrs + 2 * stride_part, mask=mask, other=-float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(other, axis=0))
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        sum_exp = sum_exp * tl.exp(maximum - shift)
        sum_exp += tl.sum(other_sum * tl.exp(other - shift[None, :]), axis=0)
        target_logit = tl.maximum(target_logit, tl.max(other_logit, axis=0))
        maximum = new_maximum
    tl.store(merged_ptr + offs_t, maximum, mask=mask_t)
    tl.store(merged_ptr + T + offs_t, sum_exp, mask=mask_t)
    tl.store(merged_ptr + 2 * T + offs_t, target_logit, mask=mask_t)


@JIT
def label_logits_kernel(
    hidden_ptr,
    lm_head_ptr,
    bias_ptr,
    logits_ptr,
    stride_hidden,
    stride_lm_head,
    T,
    V,
    D,
    logit_scale,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the logits of one block of rows and labels."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = _logits_tile(
        hidden_ptr,
        lm_head_ptr,
        bias_ptr,
        stride_hidden,
        stride_lm_head,
        offs_t,
        offs_v,
        T,
        V,
        D,
        logit_scale,
        soft_cap,
        HAS_BIAS,
        HAS_CAP,
        BLOCK_T,
        BLOCK_V,
        BLOCK_K,
    )
    ptrs = logits_ptr + offs_t.to(tl.int64)[:, None] * V + offs_v[None, :]
    tl.store(ptrs, logits, mask=(offs_t < T)[:, None] & (offs_v < V)[None, :])
