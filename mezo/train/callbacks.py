"""What a training tells its callbacks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
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
        lr: the step's learning rate.
        epoch: passes through the training examples so far, or None where they are not counted.
    """

    step: int
    num_steps: int
    seconds: float
    result: StepResult | None = None
    evaluation: EvalResult | None = None
    lr: float | None = None
    epoch: float | None = None


class Callback(Protocol):
    """Called after every step and every evaluation; a function of one argument will do."""

    def __call__(self, progress: Progress, /) -> None:
        """Look at a step or an evaluation."""
        ...


class Listener:
    """A callback that also hears of beginning, end and checkpoints, and may end the training.

    Attributes:
        should_stop: set it to end the training behind the current step.
        should_evaluate: set it for an evaluation behind the current step.
        should_save: set it for a checkpoint behind the current step, where there are any.
    """

    should_stop = should_evaluate = should_save = False

    def begin(self, num_steps: int) -> None:
        """Hear that a training of so many steps begins."""

    def step_begins(self, step: int, epoch: float | None) -> None:
        """Hear that a step begins behind ``step`` others; ``epoch`` as in `Progress`, until now."""

    def __call__(self, progress: Progress, /) -> None:
        """Look at a step or an evaluation."""

    def saved(self, step: int, path: Path) -> None:
        """Hear that a checkpoint was written behind ``step`` steps."""

    def end(self) -> None:
        """Hear that the training is over; also after an exception."""
