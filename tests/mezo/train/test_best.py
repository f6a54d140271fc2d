"""What is best on held-out examples."""

from __future__ import annotations

import pytest

from mezo.data.example import Example
from mezo.results import EvalResult
from mezo.train.best import Best, check_metric
from mezo.train.metrics import metrics_of


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


@pytest.mark.parametrize(
    ("metric", "of", "known"),
    [
        ("acuracy", None, "'accuracy', 'loss'"),
        ("eval_f1", None, "'accuracy', 'loss'"),
        ("exact_match", "f1", "'accuracy', 'f1', 'loss'"),
        ("perplexity", None, "'accuracy', 'loss'"),
    ],
)
def test_a_metric_that_evaluations_will_not_have(metric, of, known):
    examples = [Example("p", options=("a", "b"), label=i % 2) for i in range(3)]
    with pytest.raises(ValueError, match=f"metric_for_best_model must be among .{known}., got"):
        check_metric(metric, examples, metrics_of(of, examples))


def test_a_metric_that_they_will_have():
    examples = [Example("p", options=("a", "b"), label=i % 2) for i in range(3)]
    for metric, of in ((None, None), ("eval_accuracy", None), ("f1", "f1")):
        check_metric(metric, examples, metrics_of(of, examples))
    texts = [Example("p", completion="c")]
    for metric in ("loss", "perplexity"):
        check_metric(metric, texts, metrics_of(None, texts))
    with pytest.raises(ValueError, match=r"'loss', 'perplexity'., got 'accuracy'"):
        check_metric("accuracy", texts, metrics_of(None, texts))


def test_what_is_said_wins_over_the_name():
    chosen = Best("brier_loss", greater_is_better=True)
    for step, value in enumerate((5.0, 7.0, 3.0)):
        chosen.judge(step, scored(brier_loss=value))
    assert chosen.step == 1
