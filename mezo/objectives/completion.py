"""Mean negative log-likelihood of completions."""

from __future__ import annotations

from collections.abc import Sequence

from mezo.objectives.base import Targets, exact_sum


class Completion:
    """Mean negative log-likelihood of all completion tokens of a batch.

    Numerics: float64, exactly rounded sums: the order of the rows does not matter.
    """

    needs_options = False

    def loss(self, targets: Targets, logprob_sums: Sequence[float]) -> float:
        """See `Objective.loss`."""
        return exact_sum(self.example_losses(targets, logprob_sums)) / sum(targets.counts)

    def example_losses(self, targets: Targets, logprob_sums: Sequence[float]) -> list[float]:
        """Return each row's sum of its tokens' negative log-likelihoods."""
        return [-value for value in logprob_sums]

    def predictions(self, targets: Targets, logprob_sums: Sequence[float]) -> None:
        """Return None: there are no options to choose from."""

    def is_normalised(self, targets: Targets) -> tuple[bool, ...]:
        """Return True for each row: completions of different prompts are added up."""
        return (True,) * len(targets.counts)
