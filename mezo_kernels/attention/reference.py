"""The PyTorch reference: each row over its prefix and itself, in the inputs' dtype."""

import torch

from mezo_kernels.attention.inputs import AttentionInputs


def attend(inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Write the attention of all rows, and the log-sum-exp where it is asked for."""
    plan = inputs.plan
    for group in range(plan.num_groups):
        slots = plan.prefix_slots(group).to(inputs.q.device)
        k_prefix, v_prefix = inputs.k_cache[slots], inputs.v_cache[slots]
        for row in plan.group_rows(group):
            tokens = plan.row_tokens(row)
            own = slice(tokens.start, tokens.stop)
            k = torch.cat((k_prefix, inputs.k_suffix[own]))
            v = torch.cat((v_prefix, inputs.v_suffix[own]))
            out[own], row_lse = _attend_row(inputs, inputs.q[own], k, v)
            if lse is not None:
                lse[own] = row_lse


def _attend_row(
    inputs: AttentionInputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, H, D_v]` and `[S, H]`; the last S of the keys are the row's own."""
    k = k.repeat_interleave(inputs.heads_per_kv_head, dim=1)
    v = v.repeat_interleave(inputs.heads_per_kv_head, dim=1)
    scores = torch.einsum("shd,lhd->shl", q, k) * inputs.scale
    if inputs.soft_cap:
        scores = inputs.soft_cap * torch.tanh(scores / inputs.soft_cap)
    prefix_len = len(k) - len(q)
    is_seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(prefix_len)
    scores = scores.masked_fill(~is_seen[:, None, :], -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("shl,lhd->shd", (scores - lse[..., None]).exp(), v), lse
