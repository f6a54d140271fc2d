"""Cross-entropy over labelled options."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mezo.objectives.base import Targets, exact_sum


class Classification:
    """Mean over examples of the cross-entropy over the options' mean token log-likelihoods.

    Numerics: float64, exactly rounded sums: the order of the examples does not matter.
    Source: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
    """

    needs_options = True

    def loss(self, targets: Targets, logprob_sums: Sequence[float]) -> float:
        """See `Objective.loss`."""
        terms = self.example_losses(targets, logprob_sums)
        return exact_sum(terms) / len(terms)

    def example_losses(self, targets: Targets, logprob_sums: Sequence[float]) -> list[float]:
        """Return the cross-entropy of each example."""
        assert targets.labels is not None
        pairs = zip(option_scores(targets, logprob_sums), targets.labels, strict=True)
        return [_log_sum_exp(scores) - scores[label] for scores, label in pairs]

    def predictions(self, targets: Targets, logprob_sums: Sequence[float]) -> list[int | None]:
        """Return, per example, the index of the most likely option (the first of equals)."""
        return [_best(scores) for scores in option_scores(targets, logprob_sums)]

    def is_normalised(self, targets: Targets) -> tuple[bool, ...]:
        """Return False where all options of an example have one token: normalisers cancel then."""
        assert targets.num_options is not None
        flags: list[bool] = []
        for size in targets.num_options:
            counts = targets.counts[len(flags) : len(flags) + size]
            flags += [max(counts) > 1] * size
        return tuple(flags)


def option_scores(targets: Targets, logprob_sums: Sequence[float]) -> list[list[float]]:
    """Return, per example, the mean token log-likelihood of each option (nats)."""
    assert targets.num_options is not None
    means = [s / n for s, n in zip(logprob_sums, targets.counts, strict=True)]
    scores, start = [], 0
    for size in targets.num_options:
        scores.append(means[start : start + size])
        start += size
    return scores


def _best(scores: Sequence[float]) -> int | None:
    """The index of the largest score, or None."""
    # NaN first: what `max` makes of it depends on the order.
    if any(math.isnan(score) for score in scores) or not math.isfinite(max(scores)):
        return None
    return max(range(len(scores)), key=scores.__getitem__)


def _log_sum_exp(values: Sequence[float]) -> float:
    """Return log(sum(exp(values))) without overflow; NaN if one of them is."""
    top = max(values)
    if not math.isfinite(top):
        return math.nan if any(map(math.isnan, values)) else top
    return top + math.log(math.fsum(math.exp(v - top) for v in values))
