"""What a training tells its callbacks."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from mezo.results import EvalResult, StepResult


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback sees.

    Args:
        step: steps taken so far.
        num_steps: steps of the whole run.
        seconds: since training began, without evaluations.
        result: the step's result, or None after an evaluation.
        evaluation: the evaluation, or None after a step.
    """

    step: int
    num_steps: int
    seconds: float
    result: StepResult | None = None
    evaluation: EvalResult | None = None


class Callback(Protocol):
    """Called after every step and every evaluation; a function of one argument will do."""

    def __call__(self, progress: Progress, /) -> None:
        """Look at a step or an evaluation."""
        ...
