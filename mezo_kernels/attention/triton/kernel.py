"""Device code: the running softmax over a shared prefix and a row, the merge of its parts."""

import triton
import triton.language as tl


@triton.jit
def _online_softmax(q, k, v, mask, maximum, total, acc, scale, soft_cap, HAS_CAP: tl.constexpr):
    """One block of keys: `maximum` and the exponents are in base 2."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_CAP:
        # tanh by exp: 1 - 2 / (1 + e^2x) reaches -1 and 1 without overflow trouble.
        scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / soft_cap)))
    scores = tl.where(mask, scores * 1.4426950408889634, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # A row that has seen no key yet stays empty instead of NaN.
    shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def shared_prefix_kernel(
    q_ptr,
    k_suffix_ptr,
    v_suffix_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    items_ptr,
    qo_indptr_ptr,
    kv_indices_ptr,
    stride_q_token,
    stride_q_head,
    stride_ks_token,
    stride_ks_head,
    stride_vs_token,
    stride_vs_head,
    stride_kc_slot,
    stride_kc_head,
    stride_vc_slot,
    stride_vc_head,
    scale,
    soft_cap,
    GQA: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Attend from a tile of a group to a part of its prefix; the last part adds the own tokens."""
    kv_head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1) * GQA
    item_ptr = items_ptr + tl.program_id(0) * 8
    token_start, token_stop = tl.load(item_ptr), tl.load(item_ptr + 1)
    m_start = tl.load(item_ptr + 2)
    kv_start, kv_stop = tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    row_start, row_stop = tl.load(item_ptr + 5), tl.load(item_ptr + 6)
    partial = tl.load(item_ptr + 7)

    offs_m = m_start + tl.arange(0, BLOCK_M)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_d, mask_dv = offs_d < D, offs_dv < D_V
    token = token_start + offs_m // GQA
    head = kv_head * GQA + offs_m % GQA
    mask_m = token < token_stop
    q_ptrs = q_ptr + token.to(tl.int64) * stride_q_token + head * stride_q_head
    q = tl.load(
        q_ptrs[:, None] + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0
    )

    maximum = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)

    k_base, v_base = k_cache_ptr + kv_head * stride_kc_head, v_cache_ptr + kv_head * stride_vc_head
    for n in range(kv_start, kv_stop, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < kv_stop
        slot = tl.load(kv_indices_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
        k_ptrs = k_base + slot[None, :] * stride_kc_slot + offs_d[:, None]
        k = tl.load(k_ptrs, mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        v_ptrs = v_base + slot[:, None] * stride_vc_slot + offs_dv[None, :]
        v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_dv[None, :], other=0.0)
        maximum, total, acc = _online_softmax(
            q, k, v, mask_n[None, :], maximum, total, acc, scale, soft_cap, HAS_CAP
        )

    k_base, v_base = (
        k_suffix_ptr + kv_head * stride_ks_head,
        v_suffix_ptr + kv_head * stride_vs_head,
    )
    tile_stop = min(token_stop, token_start + (m_start + BLOCK_M - 1) // GQA + 1)
    for row in range(row_start, row_stop):
        own_start = tl.load(qo_indptr_ptr + row)
        own_stop = tl.load(qo_indptr_ptr + row + 1)
        is_own = (token >= own_start) & (token < own_stop)
        for s in range(own_start, min(own_stop, tile_stop), BLOCK_S):
            offs_s = s + tl.arange(0, BLOCK_S)
            mask_s = offs_s < own_stop
            k_ptrs = k_base + offs_s.to(tl.int64)[None, :] * stride_ks_token + offs_d[:, None]
            k = tl.load(k_ptrs, mask=mask_s[None, :] & mask_d[:, None], other=0.0)
            v_ptrs = v_base + offs_s.to(tl.int64)[:, None] * stride_vs_token + offs_dv[None, :]
            v = tl.load(v_ptrs, mask=mask_s[:, None] & mask_dv[None, :], other=0.0)
            mask = is_own[:, None] & (offs_s[None, :] <= token[:, None])
            maximum, total, acc = _online_softmax(
                q, k, v, mask, maximum, total, acc, scale, soft_cap, HAS_CAP
            )

    # Queries beyond the group have seen nothing; they are not stored.
    total = tl.where(mask_m, total, 1.0)
    mask_out = mask_m[:, None] & mask_dv[None, :]
    if partial < 0:
        offs_out = token.to(tl.int64) * num_heads + head
        result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_out[:, None] * D_V + offs_dv[None, :], result, mask=mask_out)
        if HAS_LSE:
            lse = (maximum + tl.log2(total)) * 0.6931471805599453
            tl.store(lse_ptr + offs_out, lse, mask=mask_m)
    else:
        # [partial results, H_kv, BLOCK_M, D_V + 2]
        base = (partial.to(tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M
        ptrs = partial_ptr + (base + tl.arange(0, BLOCK_M)) * (D_V + 2)
        tl.store(ptrs[:, None] + offs_dv[None, :], acc, mask=mask_out)
        tl.store(ptrs + D_V, maximum, mask=mask_m)
        tl.store(ptrs + D_V + 1, total, mask=mask_m)


@triton.jit
def merge_splits_kernel(
    partial_ptr,
    out_ptr,
    lse_ptr,
    merges_ptr,
    GQA: tl.constexpr,
    D_V: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Merge the parts of one tile, in the order of the prefix."""
    kv_head = tl.program_id(1).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    merge_ptr = merges_ptr + tl.program_id(0) * 5
    token_start, token_stop = tl.load(merge_ptr), tl.load(merge_ptr + 1)
    offs_m = tl.load(merge_ptr + 2) + tl.arange(0, BLOCK_M)
    first = tl.load(merge_ptr + 3).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV)
    token = token_start + offs_m // GQA
    mask_m = token < token_stop
    mask_out = mask_m[:, None] & (offs_dv < D_V)[None, :]

    maximum = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    for split in range(0, tl.load(merge_ptr + 4)):
        base = ((first + split) * num_kv_heads + kv_head) * BLOCK_M
        ptrs = partial_ptr + (base + tl.arange(0, BLOCK_M)) * (D_V + 2)
        other_acc = tl.load(ptrs[:, None] + offs_dv[None, :], mask=mask_out, other=0.0)
        # Queries beyond the group: any finite number will do.
        other_maximum = tl.load(ptrs + D_V, mask=mask_m, other=0.0)
        other_total = tl.load(ptrs + D_V + 1, mask=mask_m, other=1.0)
        new_maximum = tl.maximum(maximum, other_maximum)
        decay, weight = tl.exp2(maximum - new_maximum), tl.exp2(other_maximum - new_maximum)
        total = total * decay + other_total * weight
        acc = acc * decay[:, None] + other_acc * weight[:, None]
        maximum = new_maximum

    offs_out = token.to(tl.int64) * (num_kv_heads * GQA) + kv_head * GQA + offs_m % GQA
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_out[:, None] * D_V + offs_dv[None, :], result, mask=mask_out)
    if HAS_LSE:
        lse = (maximum + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + offs_out, lse, mask=mask_m)
