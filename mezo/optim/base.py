"""`Optimizer`: coefficients of directions from what steps have measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Estimate:
    """What one step measured.

    Args:
        step: its number.
        lr: its learning rate.
        projected_grads: the (clipped) estimate along each of its directions.
    """

    step: int
    lr: float
    projected_grads: tuple[float, ...]


class Optimizer(Protocol):
    """Says how far to go along which directions; scalars only.

    theta after a step is ``fma(c, z, theta)`` over its list, in order.
    """

    def coefficients(
        self, step: int, history: Sequence[Estimate]
    ) -> list[tuple[tuple[int, int], float]]:
        """Return the update of ``step``.

        Args:
            step: its number.
            history: what steps have measured, oldest first; the last is of ``step``. A run keeps
                no others yet: a method that needs them has to make runs keep them first.

        Returns:
            ((step, index) of a direction, its coefficient c), for each direction of ``step`` in
            order; the kernels round c to fp32 once.
        """
        ...
