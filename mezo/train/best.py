"""Which of a training's adapters was best on held-out examples, and when to stop waiting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from mezo._inputs import require
from mezo.data.example import Example
from mezo.results import EvalResult
from mezo.run import Run


class Best:
    """Keeps the weights that were best on the held-out batches.

    Args:
        metric: "loss", "accuracy" or a name in `EvalResult.metrics`; also as "eval_loss".
        greater_is_better: whether a larger value is better; None: it is, unless the name ends
            in "loss" or "perplexity".
        patience: evaluations without a better one after which the training stops; None: never.

    Attributes:
        step: steps taken before the best evaluation, or None before the first one.
        evaluation: the best one.
        value: its value of the metric.
        weights: {canonical name: fp32 tensor}: the adapter's then.
    """

    def __init__(
        self,
        metric: str | None = None,
        *,
        greater_is_better: bool | None = None,
        patience: int | None = None,
    ) -> None:
        self.metric = (metric or "loss").removeprefix("eval_")
        if greater_is_better is None:
            greater_is_better = not self.metric.endswith(("loss", "perplexity"))
        self.greater_is_better = greater_is_better
        self.patience = patience
        self.step: int | None = None
        self.value: float | None = None
        self.evaluation: EvalResult | None = None
        self.weights: dict[str, torch.Tensor] | None = None
        self._waited = 0

    def note(self, run: Run, step: int, evaluation: EvalResult) -> bool:
        """Look at an evaluation; returns whether it is the best so far.

        Raises:
            ValueError: it does not have the metric.
        """
        is_better = self.judge(step, evaluation)
        if is_better:
            self.weights = run.weights()
        return is_better

    def judge(self, step: int, evaluation: EvalResult) -> bool:
        """`note` without the weights: of a training that goes on they are replayed."""
        value = value_of(evaluation, self.metric)
        sign = 1.0 if self.greater_is_better else -1.0
        is_better = math.isfinite(value) and (
            self.value is None or sign * value > sign * self.value
        )
        self._waited = 0 if is_better else self._waited + 1
        if is_better:
            self.step, self.value, self.evaluation = step, value, evaluation
        return is_better

    @property
    def is_over(self) -> bool:
        """Whether the training should stop."""
        return self.patience is not None and self._waited >= self.patience


def check_metric(
    metric: str | None,
    examples: Sequence[Example],
    compute: Callable[[EvalResult], dict[str, float]] | None,
) -> None:
    """Raise where evaluations of some examples will not have a metric, before there is any.

    Args:
        metric: as in `Best`.
        examples: held out.
        compute: from `mezo.train.metrics.metrics_of`.

    Raises:
        ValueError: they will not.
    """
    labels = [e.label for e in examples] if examples[0].options is not None else None
    right = EvalResult(
        loss=0.0,
        accuracy=None if labels is None else 1.0,
        predictions=labels,
        num_examples=len(examples),
        tokens=0,
    )
    found = {} if compute is None else compute(right)
    value_of(dataclasses.replace(right, metrics=found), Best(metric).metric)


def value_of(evaluation: EvalResult, metric: str) -> float:
    """Return a metric's value in an evaluation; NaN where it could not be computed.

    Raises:
        ValueError: there is no such metric.
    """
    known: dict[str, float | None] = {"loss": evaluation.loss, **evaluation.metrics}
    if evaluation.predictions is not None:
        known["accuracy"] = evaluation.accuracy
    require(
        metric in known,
        f"train: metric_for_best_model must be among {sorted(known)}, got {metric!r}; use 'loss', "
        "or give the metric.",
    )
    value = known[metric]
    return math.nan if value is None else value
