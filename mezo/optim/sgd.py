"""Stochastic gradient descent, MeZO's own optimiser."""

from __future__ import annotations

from collections.abc import Sequence

from mezo.optim.base import Estimate


class Sgd:
    """theta <- theta - lr * g z, averaged over the step's directions."""

    def coefficients(
        self, step: int, history: Sequence[Estimate]
    ) -> list[tuple[tuple[int, int], float]]:
        """See `Optimizer.coefficients`."""
        last = history[-1]
        grads = last.projected_grads
        return [
            ((step, index), update_coefficient(value, last.lr, len(grads)))
            for index, value in enumerate(grads)
        ]


def update_coefficient(value: float, lr: float, num_directions: int) -> float:
    """Return c of ``theta <- fma(c, z, theta)`` for one of ``num_directions`` averaged directions.

        c = -lr * projected_grad / num_directions

    Args:
        value: the (clipped) projected_grad of the direction.
        lr: learning rate.
        num_directions: directions averaged in this step.

    Returns:
        The coefficient; the kernels round it to fp32 once.

    Source: Malladi et al. 2023 (arXiv 2305.17333), Algorithms 1 and 2.
    """
    return -lr * value / num_directions
