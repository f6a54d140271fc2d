"""What the step loop asks of an engine; the modules and packages beside this one provide it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from mezo.core.step import Scores, StepReply, StepRequest
from mezo.data.batch import Rows
from mezo.diagnostics.selftest import Check


class Session(Protocol):
    """One adapter attached to one engine.

    Attributes:
        lock: one an engine; held by whoever sends it something, so that threads take turns.
    """

    lock: AbstractContextManager[Any]
    engine_name: str
    versions: dict[str, str]
    model_path: str
    tokenizer: Any
    max_row_tokens: int
    vocab_size: int
    dtype: torch.dtype
    # Names and shapes of the tensors that make fused projections whole and are not trained.
    partners: dict[str, tuple[int, ...]]

    def step(self, request: StepRequest) -> StepReply:
        """Run one step on every rank and return its scalars."""
        ...

    def score(self, rows: Rows, slot: str) -> Scores:
        """Score rows under the current adapter (`core.THETA`) or the base model (`core.BASE`)."""
        ...

    def apply_update(self, step: int, coefficients: Sequence[float]) -> None:
        """Take ``step``: theta <- fma(c, z, theta) over its directions; no c is a skipped step."""
        ...

    def progress(self) -> tuple[int, StepReply | None]:
        """Return how many steps were taken, and the last one's reply: None for a known update.

        This is what a caller asks that was interrupted in a step.
        """
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the current fp32 adapter, whole, by canonical name."""
        ...

    def selftest(self, rows: Rows) -> list[Check]:
        """Check what `mezo.diagnostics.selftest` asks of an engine, on rows without prefixes."""
        ...

    def close(self) -> None:
        """Take the adapter out of the engine and give back what it holds."""
        ...
