"""Estimators: losses of perturbed weights in, one number per direction out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Estimator(Protocol):
    """Estimates directional derivatives from losses; scalars only."""

    def projected_grads(
        self, losses_plus: Sequence[float], losses_minus: Sequence[float], eps: float
    ) -> list[float]:
        """Return the estimate along each of n directions, before it is clipped.

        Args:
            losses_plus: n losses L(theta + eps z), nats, all finite.
            losses_minus: n losses L(theta - eps z), nats, all finite.
            eps: perturbation scale, not 0.
        """
        ...


class TwoSided:
    """SPSA's two-point estimate along each direction, see `projected_grad`."""

    def projected_grads(
        self, losses_plus: Sequence[float], losses_minus: Sequence[float], eps: float
    ) -> list[float]:
        """See `Estimator.projected_grads`."""
        pairs = zip(losses_plus, losses_minus, strict=True)
        return [projected_grad(plus, minus, eps) for plus, minus in pairs]


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
    """Return ``value`` limited to [-bound, bound]; ``bound=None`` does not change it."""
    if bound is None:
        return value
    return math.copysign(min(abs(value), bound), value)
