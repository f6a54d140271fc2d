"""What is best on held-out examples."""

from __future__ import annotations

import pytest

from mezo.results import EvalResult
from mezo.train.best import Best


def scored(**metrics):
    return EvalResult(
        loss=1.0, accuracy=None, predictions=None, num_examples=1, tokens=1, metrics=metrics
    )


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        *[("brier_loss", 2), ("eval_brier_loss", 2), ("word_perplexity", 2), ("perplexity", 2)],
        *[("f1", 1), ("loss_free_score", 1)],
    ],
)
def test_losses_of_the_user_s_are_minimised(metric, best):
    chosen = Best(metric)
    for step, value in enumerate((5.0, 7.0, 3.0)):
        chosen.judge(step, scored(**{metric.removeprefix("eval_"): value}))
    assert chosen.step == best


def test_what_is_said_wins_over_the_name():
    chosen = Best("brier_loss", greater_is_better=True)
    for step, value in enumerate((5.0, 7.0, 3.0)):
        chosen.judge(step, scored(brier_loss=value))
    assert chosen.step == 1
