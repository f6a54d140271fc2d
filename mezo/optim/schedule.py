"""Learning rates over a run. To add one, write a function and a row."""

from __future__ import annotations

import math
from typing import Protocol

from mezo._registry import Registry


class Schedule(Protocol):
    """The course of the learning rate over a run."""

    def __call__(self, base: float, progress: float, /) -> float:
        """Return the rate where ``progress``, in [0, 1), of the run is done; ``base`` at 0."""
        ...


def constant(base: float, progress: float) -> float:
    """Return ``base`` at every step."""
    return base


def linear(base: float, progress: float) -> float:
    """Return a rate that falls linearly to 0."""
    return base * (1.0 - progress)


def cosine(base: float, progress: float) -> float:
    """Return a rate that falls to 0 along half a cosine."""
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: Registry[Schedule] = Registry(
    "schedule", {"constant": constant, "linear": linear, "cosine": cosine}
)


def learning_rate(
    base: float, step: int, num_steps: int, schedule: str, *, warmup_steps: int = 0
) -> float:
    """Return the learning rate of ``step`` (0-based) in a run of ``num_steps``.

    Args:
        base: the rate of step 0, or of the first step behind the warm-up.
        step: 0 .. num_steps - 1.
        num_steps: length of the run.
        schedule: a name in `SCHEDULES`; it runs over the steps behind the warm-up.
        warmup_steps: W steps in which the rate rises: step s has ``base * (s + 1) / (W + 1)``.

    Raises:
        ValueError: an unknown schedule.
    """
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    return SCHEDULES[schedule](base, (step - warmup_steps) / max(num_steps - warmup_steps, 1))
