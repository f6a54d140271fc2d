"""What a model does to its logits after lm_head."""

from typing import NamedTuple

import torch


class LogitsRule(NamedTuple):
    """logit <- cap(scale * (logit + bias)), cap(x) = soft_cap * tanh(x / soft_cap) or x."""

    scale: float
    soft_cap: float

    def apply_(self, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Finish the logits of a tile in place."""
        if bias is not None:
            logits.add_(bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.soft_cap:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
