"""Losses from row sums against torch in float64."""

from __future__ import annotations

import random

import pytest
import torch

from mezo.objectives import Targets, batch_loss, option_scores, predictions


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
