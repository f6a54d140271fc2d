"""What the step loop asks of an engine; `mezo.engines.transformers` and `mezo.sglang` give it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from mezo.core import Scores, StepReply, StepRequest
from mezo.data import Rows


class Session(Protocol):
    """One adapter attached to one engine."""

    engine_name: str
    versions: dict[str, str]
    model_path: str
    tokenizer: Any
    max_row_tokens: int
    vocab_size: int
    # Names and shapes of the tensors that make fused projections whole and are not trained.
    partners: dict[str, tuple[int, ...]]

    def step(self, request: StepRequest) -> StepReply:
        """Run one step on every rank and return its scalars."""
        ...

    def score(self, rows: Rows, slot: str) -> Scores:
        """Score rows under the current adapter (`core.THETA`) or the base model (`core.BASE`)."""
        ...

    def apply_update(self, step: int, coefficients: Sequence[float]) -> None:
        """Take theta <- fma(c, z, theta) over the directions of ``step``."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the current fp32 adapter, whole, by canonical name."""
        ...

    def close(self) -> None:
        """Take the adapter out of the engine and give back what it holds."""
        ...
