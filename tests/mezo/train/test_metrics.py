"""Metrics against independent computations on random predictions."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from mezo import tasks
from mezo.data.example import Example
from mezo.results import EvalResult
from mezo.train.metrics import METRICS, metrics_of, normalised


def random_case(seed, num_options, n=60):
    rng = random.Random(seed)
    options = tuple(map(str, range(num_options)))
    examples = [
        Example("p", options=options, label=rng.randrange(num_options), group=f"q{i // 3}")
        for i in range(n)
    ]
    predictions = [rng.choice([*range(num_options), None]) for _ in range(n)]
    return predictions, examples


@pytest.mark.parametrize("num_options", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_accuracy_and_f1_from_a_confusion_matrix(seed, num_options):
    predictions, examples = random_case(seed, num_options)
    matrix = np.zeros((num_options, num_options + 1))  # the last column: no prediction
    for p, e in zip(predictions, examples, strict=True):
        matrix[e.label, num_options if p is None else p] += 1
    right = np.diag(matrix[:, :num_options])
    assert METRICS["accuracy"].compute(predictions, examples) == {
        "accuracy": pytest.approx(right.sum() / len(examples))
    }
    with np.errstate(invalid="ignore"):
        precision = right / matrix[:, :num_options].sum(0)
        recall = right / matrix.sum(1)
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    expected = f1[1] if num_options == 2 else f1.mean()
    assert METRICS["f1"].compute(predictions, examples)["f1"] == pytest.approx(expected)


def test_f1_of_labels_that_never_occur_is_not_counted():
    examples = [Example("p", options=("a", "b", "c"), label=0)] * 4
    assert METRICS["f1"].compute([0, 0, 0, 0], examples) == {"f1": 1.0}


def test_questions_are_right_as_a_whole():
    examples = [
        Example("p", options=("no", "yes"), label=x, group=g)
        for g, x in (("a", 1), ("a", 0), ("b", 1), ("b", 1))
    ]
    found = METRICS["by_question"].compute([1, 0, 1, 0], examples)
    assert found["exact_match"] == 0.5
    assert found["f1"] == pytest.approx(2 * 2 / (2 + 3))


def test_cb_is_scored_by_the_mean_of_f1_over_its_three_classes():
    """Computed by hand: precision and recall of each class."""
    task = tasks.get("cb")
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]
    examples = [Example("p", options=("Yes", "No", "Maybe"), label=x) for x in labels]
    first = 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)
    second = 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)
    found = METRICS[task.metric].compute(predictions, examples)
    assert found["f1"] == pytest.approx((first + second + 0.0) / 3)


def test_record_is_scored_by_the_words_of_the_entity_that_was_chosen():
    """Computed by hand: the best of the answers, SQuAD's normalisation, the mean over queries."""
    rows = [
        # One of the 2 words is the answer "ann": 2 * 1 / (2 + 1). The other answer gives 2 / 5.
        (("Ann Lee", "Bob"), ("Ann", "The Ann of Rome"), 0, 2 / 3, 0.0),
        (("the Alps", "Rome"), ("Alps",), 0, 1.0, 1.0),
        (("Oslo", "Rome"), ("Rome",), 0, 0.0, 0.0),
        (("Oslo", "Rome"), ("Rome",), None, 0.0, 0.0),
    ]
    examples = [
        Example("p", options=("x", "y"), label=1, names=names, answers=answers)
        for names, answers, *_ in rows
    ]
    metric = METRICS[tasks.get("record").metric]
    assert metric.compute([row[2] for row in rows], examples) == {
        "f1": pytest.approx(sum(row[3] for row in rows) / 4),
        "exact_match": sum(row[4] for row in rows) / 4,
    }
    with pytest.raises(ValueError, match="answer_f1 must come with options that have names"):
        metric.compute([0], [Example("p", options=("x", "y"), label=1)])


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("The  Denver Broncos!", ("Denver Broncos",), 1.0, 1.0),
        ("Broncos of Denver", ("Denver Broncos", "no"), 0.0, 0.8),
        ("", ("a",), 1.0, 1.0),  # nothing is left of either
        ("", ("b c",), 0.0, 0.0),
        ("b b c", ("b c c",), 0.0, 2 / 3),
    ],
)
def test_texts(text, answers, exact, f1):
    examples = [Example("p", completion="x", answers=answers)]
    found = METRICS["token_f1"].compute([text], examples)
    assert found == {"f1": pytest.approx(f1), "exact_match": exact}


@pytest.mark.parametrize(
    ("text", "answer", "exact"),
    [
        (" A  Cat ", "a cat", 1.0),
        ("5", "-5", 0.0),
        ("1.5", "15", 0.0),
        ("", "A", 0.0),
        ("the", "a", 0.0),
        ("cat.", "cat", 0.0),
        (None, "cat", 0.0),
    ],
)
def test_an_exact_match_drops_nothing_of_an_answer(text, answer, exact):
    examples = [Example("p", completion="x", answers=("other", answer))]
    assert METRICS["exact_match"].compute([text], examples) == {"exact_match": exact}


@pytest.mark.parametrize("name", ["exact_match", "token_f1"])
def test_a_metric_of_texts_needs_answers(name):
    examples = [Example((5,), completion=(6, 7))]
    with pytest.raises(ValueError, match=f"metric '{name}' must come with right answers, got"):
        metrics_of(name, examples)


def test_random_texts_against_a_plain_computation():
    rng = random.Random(0)
    words = ["the", "An", "cat,", "dog", "cat", "a", "Dog!"]

    def clean(text):
        found = re.findall(r"[a-z]+", text.lower())
        return [w for w in found if w not in ("a", "an", "the")]

    for _ in range(100):
        ours, theirs = (" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in "ab")
        assert normalised(ours).split() == clean(ours)
        a, b = Counter(clean(ours)), Counter(clean(theirs))
        both = sum(min(a[w], b[w]) for w in a)
        expected = float(a == b) if not a or not b else 2 * both / (a.total() + b.total())
        example = Example("p", completion="x", answers=(theirs,))
        found = METRICS["token_f1"].compute([ours], [example])["f1"]
        assert found == pytest.approx(expected), (ours, theirs)


def test_what_a_training_computes():
    predictions, examples = random_case(0, 2, n=4)
    scores = [[-1.0, -2.0]] * 4
    result = EvalResult(0.5, 0.5, predictions, 4, 10, scores=scores, labels=[0, 1, 0, 1])
    seen = []

    def mine(prediction):
        seen.append(prediction)
        return {"mine": 3.0}

    compute = metrics_of("f1", examples, mine)
    expected = METRICS["f1"].compute(predictions, examples)
    assert compute(result) == {**expected, "mine": 3.0}
    assert seen[0].predictions.shape == (4, 2)
    assert seen[0].label_ids.tolist() == [0, 1, 0, 1]
    assert metrics_of(None, examples)(result) == {}
    completions = [Example("p", completion="x")]
    found = metrics_of(None, completions)(EvalResult(0.5, None, None, 1, 3))
    assert found == {"perplexity": math.exp(0.5)}
    assert metrics_of(None, completions)(EvalResult(1e4, None, None, 1, 3)) == {
        "perplexity": math.inf
    }


def test_unequal_options_are_padded():
    result = EvalResult(0.5, 1.0, [0], 2, 10, scores=[[-1.0], [-2.0, -3.0]], labels=[0, 1])
    seen = []
    examples = [Example("p", options=("a", "b"), label=0)] * 2
    metrics_of(None, examples, lambda p: seen.append(p) or {})(result)
    assert seen[0].predictions.tolist() == [[-1.0, -math.inf], [-2.0, -3.0]]


def test_a_metric_that_does_not_suit_is_refused():
    with pytest.raises(ValueError, match=r"metric must be one of: accuracy, .* got 'bleu'"):
        metrics_of("bleu", [Example("p", completion="x")])
    with pytest.raises(ValueError, match="'f1' must come with options, got completions"):
        metrics_of("f1", [Example("p", completion="x")])
