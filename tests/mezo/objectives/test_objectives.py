"""Losses from row sums against torch in float64."""

from __future__ import annotations

import math
import random

import pytest
import scipy.stats
import torch

import mezo
from mezo import objectives
from mezo.objectives.base import Targets, signal_to_noise
from mezo.objectives.classification import option_scores


def batch_loss(targets, sums):
    return objectives.of(targets).loss(targets, sums)


def example_losses(targets, sums):
    return objectives.of(targets).example_losses(targets, sums)


def predictions(targets, sums):
    return objectives.of(targets).predictions(targets, sums)


def test_completion_loss_is_the_mean_over_all_tokens():
    rng = random.Random(0)
    tokens = [[-rng.expovariate(1.0) for _ in range(rng.randint(1, 6))] for _ in range(20)]
    targets = Targets(counts=tuple(map(len, tokens)))
    expected = -torch.tensor([t for row in tokens for t in row], dtype=torch.float64).mean()
    assert batch_loss(targets, [sum(row) for row in tokens]) == pytest.approx(
        expected.item(), rel=1e-14
    )


def test_classification_loss_is_cross_entropy_over_mean_log_likelihoods():
    rng = random.Random(1)
    sizes = [rng.randint(2, 5) for _ in range(20)]
    counts = [rng.randint(1, 4) for _ in range(sum(sizes))]
    sums = [-20 * rng.random() for _ in counts]
    labels = [rng.randrange(size) for size in sizes]
    targets = Targets(tuple(counts), tuple(sizes), tuple(labels))
    means = torch.tensor(sums, dtype=torch.float64) / torch.tensor(counts)
    rows = means.split(sizes)
    expected = torch.stack(
        [-row.log_softmax(0)[label] for row, label in zip(rows, labels, strict=True)]
    ).mean()
    assert batch_loss(targets, sums) == pytest.approx(expected.item(), rel=1e-13)
    assert predictions(targets, sums) == [int(row.argmax()) for row in rows]
    assert [len(s) for s in option_scores(targets, sums)] == sizes


def test_extreme_and_nonfinite_scores():
    two = Targets((1, 1), (2,), (0,))
    assert batch_loss(two, [-1e5, -1e5]) == pytest.approx(0.6931471805599453)
    assert batch_loss(two, [0.0, -1e6]) == 0.0
    assert batch_loss(two, [float("-inf"), 0.0]) == float("inf")
    assert batch_loss(two, [float("nan"), 0.0]) != batch_loss(two, [float("nan"), 0.0])
    assert batch_loss(Targets((1,)), [float("-inf")]) == float("inf")


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([NAN, 0.0], None),  # max() would say 0 here
        ([0.0, NAN], None),  # and 0 here
        ([-1.0, INF], None),
        ([-INF, -INF], None),
        ([-INF, -3.0], 1),  # an impossible option is a score
        ([-2.0, -2.0], 0),
    ],
)
def test_scores_that_are_not_finite_predict_nothing(scores, best):
    targets = Targets((1, 1), (2,), (0,))
    assert predictions(targets, scores) == [best]

    from mezo.results import evaluation

    result = evaluation(targets, scores, tokens=7)
    assert result.accuracy == (None if best is None else float(best == 0))
    assert result.num_nonfinite == (best is None)
    is_ok = best is not None and math.isfinite(result.loss)
    assert (result.status is mezo.EvalStatus.OK) == is_ok
    assert result.loss != 0.0


def test_infinite_losses_of_both_signs_are_no_crash():
    assert math.isnan(batch_loss(Targets((1, 1)), [INF, -INF]))
    assert batch_loss(Targets((1, 1)), [-1.7e308, -1.7e308]) == INF
    assert signal_to_noise([INF, 0.0], [0.0, INF]) is None
    assert math.isnan(batch_loss(Targets((1, 1), (2,), (0,)), [INF, NAN]))
    # The order of the options does not matter.
    assert math.isnan(batch_loss(Targets((1, 1), (2,), (0,)), [1.0, NAN]))

    from mezo.results import evaluation

    assert evaluation(Targets((1, 2)), [-1.0, NAN], tokens=3).num_nonfinite == 1


def test_signal_to_noise_is_the_t_statistic_of_the_paired_differences():
    rng = random.Random(4)
    plus = [rng.gauss(2, 1) for _ in range(12)]
    minus = [rng.gauss(1, 1) for _ in range(12)]
    expected = abs(scipy.stats.ttest_rel(plus, minus).statistic)
    assert signal_to_noise(plus, minus) == pytest.approx(expected, rel=1e-12)


def test_signal_to_noise_of_too_little():
    assert signal_to_noise([1.0], [2.0]) is None
    assert signal_to_noise([1.0, 2.0], [1.0, 2.0]) is None
    assert signal_to_noise([1.0, float("nan")], [1.0, 2.0]) is None


def test_example_losses_add_up_to_the_batch_loss():
    sums = [-1.0, -2.5, -0.5, -4.0]
    completion = Targets(counts=(1, 2, 1, 3))
    assert math.fsum(example_losses(completion, sums)) / 7 == batch_loss(completion, sums)
    options = Targets(counts=(1, 2, 1, 3), num_options=(2, 2), labels=(0, 1))
    assert math.fsum(example_losses(options, sums)) / 2 == batch_loss(options, sums)


def test_one_token_options_need_no_normaliser():
    targets = Targets(counts=(1, 1, 1, 2), num_options=(2, 2), labels=(0, 1))
    assert objectives.of(targets).is_normalised(targets) == (False, False, True, True)
    completions = Targets(counts=(1, 1))
    assert objectives.of(completions).is_normalised(completions) == (True, True)


def test_a_batch_names_its_objective():
    with_options = {"prompts": ["a"], "options": [" b", " c"], "labels": [0]}
    assert mezo.Batch(["a"], completions=[" b"]).objective is None
    assert mezo.Batch(**with_options, objective="classification").objective == "classification"
    assert objectives.name_for(None, has_options=False) == "completion"
    assert objectives.name_for(None, has_options=True) == "classification"
    with pytest.raises(ValueError, match="'completion' must come with completions, got options"):
        mezo.Batch(**with_options, objective="completion")
    with pytest.raises(ValueError, match="'classification' must come with options and labels"):
        mezo.Batch(["a"], completions=[" b"], objective="classification")
    with pytest.raises(ValueError, match="got 'clasification', use 'classification'"):
        mezo.Batch(**with_options, objective="clasification")
