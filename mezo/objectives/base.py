"""`Objective` and `Targets`: losses of a batch from the log-likelihoods of its rows.

Engines return one number per row, the sum of the log-likelihoods of its completion tokens (nats).
Everything after that is a handful of scalars, computed here in float64, the same for every engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Targets:
    """What the rows of an encoded batch are, without their tokens.

    Args:
        counts: completion tokens of each row, >= 1.
        num_options: rows of each example, or None: one row each, a completion.
        labels: index of the right option of each example, or None.
        objective: name of the loss; None: "classification" where there are options, else
            "completion".
    """

    counts: tuple[int, ...]
    num_options: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    objective: str | None = None


class Objective(Protocol):
    """One kind of loss."""

    @property
    def needs_options(self) -> bool:
        """Whether its rows are options of labelled examples; else they are completions."""
        ...

    def loss(self, targets: Targets, logprob_sums: Sequence[float]) -> float:
        """Return the loss of a batch, in nats.

        Args:
            targets: R rows.
            logprob_sums: R sums of completion-token log-likelihoods, nats.

        Returns:
            The loss, float64; NaN or inf where a sum is.

        Numerics: the order of the rows must not matter (see `exact_sum`): a different order of the
            plus and the minus rows would look like a gradient.
        """
        ...

    def example_losses(self, targets: Targets, logprob_sums: Sequence[float]) -> list[float]:
        """Return what each example adds to a batch's loss, in nats."""
        ...

    def predictions(
        self, targets: Targets, logprob_sums: Sequence[float]
    ) -> list[int | None] | None:
        """Return the option that each example's scores name, and None for all where there is none.

        None for an example whose scores name no option: one is NaN or +inf, or all are -inf.
        """
        ...

    def is_normalised(self, targets: Targets) -> tuple[bool, ...]:
        """Return, per row, whether its score has to be a log-likelihood; see `Rows`."""
        ...


def signal_to_noise(plus: Sequence[float], minus: Sequence[float]) -> float | None:
    """Return abs(L+ - L-) over its standard error, from the examples' own differences.

        d_i = plus_i - minus_i;   abs(sum d) / sqrt(N var(d))

    The noise is that of the draw of the batch and of rounding in the forward, both of which differ
    from example to example. Below 1 the sign of a projected gradient says little about other
    batches.

    Args:
        plus: `example_losses` under theta + eps z of N examples.
        minus: the same under theta - eps z.

    Returns:
        The ratio; None for fewer than two examples, or where all differences are equal.
    """
    differences = [p - m for p, m in zip(plus, minus, strict=True)]
    count, total = len(differences), exact_sum(differences)
    if count < 2 or not math.isfinite(total):
        return None
    mean = total / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return abs(total) / math.sqrt(count * variance) if variance > 0 else None


def exact_sum(values: Sequence[float]) -> float:
    """Return the exactly rounded sum; inf or NaN where there is none."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        return sum(values)
