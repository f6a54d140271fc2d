"""The estimator on scalars: two losses in, one coefficient out."""

from __future__ import annotations

import math


def projected_grad(loss_plus: float, loss_minus: float, eps: float) -> float:
    """Return the two-point estimate of the directional derivative along z.

        (loss_plus - loss_minus) / (2 * eps)

    Args:
        loss_plus: L(theta + eps z), nats.
        loss_minus: L(theta - eps z), nats, on the same batch.
        eps: perturbation scale, not 0.

    Returns:
        The estimate, nats per unit of theta along z; not finite when a loss is not.

    Source: Spall 1992 (SPSA); Malladi et al. 2023 (arXiv 2305.17333), Definition 1.
    """
    return (loss_plus - loss_minus) / (2.0 * eps)


def clip_projected_grad(value: float, bound: float | None) -> float:
    """Return ``value`` limited to [-bound, bound]; ``bound=None`` leaves it alone."""
    if bound is None:
        return value
    return math.copysign(min(abs(value), bound), value)


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
