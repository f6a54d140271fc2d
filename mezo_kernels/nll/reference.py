"""The PyTorch reference: whole logits, log-sum-exp, the target's logit; in the inputs' dtype."""

import torch

from mezo_kernels.nll.logits import LogitsRule


def label_nll_parts(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    rule: LogitsRule,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (max, sum_exp, target_logit) of each row."""
    logits = label_logits(hidden, lm_head, bias, rule)
    maximum = logits.amax(1)
    # A row of only -inf keeps sum 0 instead of NaN.
    shift = maximum.clamp(min=torch.finfo(logits.dtype).min)
    sum_exp = (logits - shift[:, None]).exp().sum(1)
    local = targets - vocab_start
    is_here = (local >= 0) & (local < len(lm_head))
    picked = logits.gather(1, local.clamp(0, len(lm_head) - 1)[:, None])[:, 0]
    return maximum, sum_exp, picked.masked_fill(~is_here, -torch.inf)


def label_logits(
    hidden: torch.Tensor, lm_head: torch.Tensor, bias: torch.Tensor | None, rule: LogitsRule
) -> torch.Tensor:
    """Return the logits of all rows of ``lm_head``, fp32 or wider."""
    logits = hidden @ lm_head.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    logits = logits * rule.scale
    if rule.soft_cap:
        logits = rule.soft_cap * torch.tanh(logits / rule.soft_cap)
    return logits
