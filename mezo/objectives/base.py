"""Losses of a batch from the log-likelihoods of its rows.

Engines return one number a row, the sum of the log-likelihoods of its completion tokens (nats).
Everything after that is a handful of scalars, computed here in float64, the same for every engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Targets:
    """What the rows of an encoded batch are, without their tokens.

    Args:
        counts: completion tokens of each row, >= 1.
        num_options: rows of each example (classification), or None (completion: one row each).
        labels: index of the right option of each example, or None.
    """

    counts: tuple[int, ...]
    num_options: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None

    @property
    def is_classification(self) -> bool:
        """Whether the rows are options of labelled examples."""
        return self.num_options is not None


def batch_loss(targets: Targets, logprob_sums: Sequence[float]) -> float:
    """Return the loss of a batch, in nats.

    Completion: mean negative log-likelihood of all completion tokens of the batch. Classification:
    mean over examples of the cross-entropy over the options' mean token log-likelihoods.

    Args:
        targets: R rows.
        logprob_sums: R sums of completion-token log-likelihoods, nats.

    Returns:
        The loss, float64.

    Numerics: float64, exactly rounded sums: the order of the rows does not matter.
    Source: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
    """
    terms = example_losses(targets, logprob_sums)
    count = len(terms) if targets.is_classification else sum(targets.counts)
    return _sum(terms) / count


def example_losses(targets: Targets, logprob_sums: Sequence[float]) -> list[float]:
    """Return what each example adds to a batch's loss, in nats.

    Completion: the sum of its tokens' negative log-likelihoods. Classification: its cross-entropy.
    """
    if not targets.is_classification:
        return [-value for value in logprob_sums]
    assert targets.labels is not None
    return [
        _log_sum_exp(scores) - scores[label]
        for scores, label in zip(option_scores(targets, logprob_sums), targets.labels, strict=True)
    ]


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
    count, total = len(differences), _sum(differences)
    if count < 2 or not math.isfinite(total):
        return None
    mean = total / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return abs(total) / math.sqrt(count * variance) if variance > 0 else None


def option_scores(targets: Targets, logprob_sums: Sequence[float]) -> list[list[float]]:
    """Return, per example, the mean token log-likelihood of each option (nats)."""
    assert targets.num_options is not None
    means = [s / n for s, n in zip(logprob_sums, targets.counts, strict=True)]
    scores, start = [], 0
    for size in targets.num_options:
        scores.append(means[start : start + size])
        start += size
    return scores


def predictions(targets: Targets, logprob_sums: Sequence[float]) -> list[int | None]:
    """Return, per example, the index of the most likely option (the first of equals).

    None where the scores name none: one is NaN or +inf, or all are -inf.
    """
    return [_best(scores) for scores in option_scores(targets, logprob_sums)]


def _best(scores: Sequence[float]) -> int | None:
    """The index of the largest score, or None."""
    # NaN first: what `max` makes of it depends on the order.
    if any(math.isnan(score) for score in scores) or not math.isfinite(max(scores)):
        return None
    return max(range(len(scores)), key=scores.__getitem__)


def _sum(values: Sequence[float]) -> float:
    """Return the exactly rounded sum; inf or NaN where there is none."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        return sum(values)


def _log_sum_exp(values: Sequence[float]) -> float:
    """Return log(sum(exp(values))) without overflow; NaN if one of them is."""
    top = max(values)
    if not math.isfinite(top):
        return math.nan if any(map(math.isnan, values)) else top
    return top + math.log(math.fsum(math.exp(v - top) for v in values))
