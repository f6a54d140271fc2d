"""What is computed from predictions beside the loss: accuracy, F1, exact match. Add a row for more.

Source: token_f1 normalises texts as SQuAD's evaluation does (Rajpurkar et al. 2016);
F1 over all options and exact match per question as in MultiRC (Khashabi et al. 2018); the mean of
F1 over classes as for CB, the best F1 over a query's answers as for ReCoRD (SuperGLUE, Wang et al.
2019).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mezo._inputs import require
from mezo._registry import Registry
from mezo.data.example import Example
from mezo.results import EvalResult


@dataclass(frozen=True)
class Metric:
    """One kind of figure.

    Args:
        compute: (what was predicted: an option's index or a text, None for none; the examples) ->
            {name: value}.
        is_of_text: whether it needs generated text; else options.
        greater_is_better: whether a larger value is better.
    """

    compute: Callable[[Sequence[Any], Sequence[Example]], Mapping[str, float]]
    is_of_text: bool = False
    greater_is_better: bool = True


def accuracy(predictions: Sequence[int | None], examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of right options."""
    hits = sum(p == e.label for p, e in zip(predictions, examples, strict=True))
    return {"accuracy": hits / len(examples)}


def f1(predictions: Sequence[int | None], examples: Sequence[Example]) -> dict[str, float]:
    """Return F1: of label 1 where there are two labels, else the mean over labels that occur."""
    labels = [e.label for e in examples]
    num = max(len(e.options or ()) for e in examples)
    occurring = {x for x in (*labels, *predictions) if x is not None}
    wanted = [1] if num == 2 else sorted(occurring)
    scores = []
    for label in wanted:
        pairs = list(zip(predictions, labels, strict=True))
        hits = sum(p == label == true for p, true in pairs)
        named = sum(p == label for p, _ in pairs) + sum(true == label for _, true in pairs)
        scores.append(2 * hits / named if named else 0.0)
    return {"f1": sum(scores) / len(scores)}


def by_question(predictions: Sequence[int | None], examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of questions (`Example.group`) all of whose examples are right, and F1."""
    is_right: dict[str, bool] = {}
    for p, e in zip(predictions, examples, strict=True):
        is_right[e.group] = is_right.get(e.group, True) and p == e.label
    return {"exact_match": sum(is_right.values()) / len(is_right), **f1(predictions, examples)}


def exact_match(predictions: Sequence[str | None], examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of texts that are one of the answers; case and blanks do not count."""
    return _matches(predictions, examples, _folded)


def token_f1(predictions: Sequence[str | None], examples: Sequence[Example]) -> dict[str, float]:
    """Return SQuAD's figures: the mean F1 of words against the best answer, and exact match."""
    scores = [
        max((_words_f1(p or "", a) for a in e.answers), default=0.0)
        for p, e in zip(predictions, examples, strict=True)
    ]
    matches = _matches(predictions, examples, normalised)
    return {"f1": math.fsum(scores) / len(scores), **matches}


def _matches(
    predictions: Sequence[str | None], examples: Sequence[Example], read: Callable[[str], str]
) -> dict[str, float]:
    """The share of texts that read as one of the answers does."""
    hits = [
        any(read(p or "") == read(a) for a in e.answers)
        for p, e in zip(predictions, examples, strict=True)
    ]
    return {"exact_match": sum(hits) / len(hits)}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def answer_f1(predictions: Sequence[int | None], examples: Sequence[Example]) -> dict[str, float]:
    """Return `token_f1` of what the chosen options stand for (`Example.names`)."""
    for example in examples:
        require(
            bool(example.names),
            "eval: metric answer_f1 must come with options that have names, got others; it is "
            "record's, use accuracy or f1.",
        )
    texts = [None if p is None else e.names[p] for p, e in zip(predictions, examples, strict=True)]
    return token_f1(texts, examples)


def normalised(text: str) -> str:
    """Return a text as SQuAD has it: lower case, no punctuation, articles or doubled blanks.

    Of numbers and of answers that are an article nothing may be left: "-5" is "5" and "A" is "".
    """
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _words_f1(text: str, answer: str) -> float:
    """F1 of the words of two texts, as bags."""
    ours, theirs = normalised(text).split(), normalised(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "accuracy": Metric(accuracy),
        "f1": Metric(f1),
        "by_question": Metric(by_question),
        "answer_f1": Metric(answer_f1),
        "exact_match": Metric(exact_match, is_of_text=True),
        "token_f1": Metric(token_f1, is_of_text=True),
    },
)


def metrics_of(
    name: str | None,
    examples: Sequence[Example],
    compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
) -> Callable[[EvalResult], dict[str, float]] | None:
    """Return what a training computes from each evaluation of its held-out examples.

    Args:
        name: of a metric; None: perplexity for completions, nothing for options.
        examples: held out.
        compute_metrics: the user's, see `mezo.train.training.train`.

    Raises:
        ValueError: an unknown metric, or one of options or of answers for examples without.
    """
    if not examples:
        return None
    has_options = examples[0].options is not None
    metric = None if name is None else METRICS[METRICS.check(name, "train: ")]
    if metric is not None and metric.is_of_text:
        check_answers(str(name), examples)
    if metric is not None and not metric.is_of_text:
        require(
            has_options,
            f"train: metric {name!r} must come with options, got completions; use exact_match or "
            "token_f1 with `mezo eval`, or leave it out.",
        )

    def compute(evaluation: EvalResult) -> dict[str, float]:
        found: dict[str, float] = {}
        if not has_options:
            found["perplexity"] = perplexity(evaluation.loss)
        elif metric is not None and not metric.is_of_text and name != "accuracy":
            found |= metric.compute(evaluation.predictions or (), examples)
        if compute_metrics is not None:
            found |= compute_metrics(_eval_prediction(evaluation))
        return found

    return compute


def check_answers(name: str, examples: Sequence[Example]) -> None:
    """Refuse a metric of texts for examples without right answers (ValueError)."""
    require(
        all(example.answers for example in examples),
        f"eval: metric {name!r} must come with right answers, got examples without any, as texts "
        "of which every token is learnt; use prompts and completions, or leave the metric out.",
    )


def perplexity(loss: float) -> float:
    """Return exp(loss), inf where that is too large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _eval_prediction(evaluation: EvalResult) -> Any:
    """Scores ``[N, C]`` (-inf behind fewer options) and labels ``[N]`` as Hugging Face has them."""
    import numpy as np
    from transformers import EvalPrediction

    scores = evaluation.scores or []
    width = max(map(len, scores))
    padded = [[*row, *[-math.inf] * (width - len(row))] for row in scores]
    labels = None if evaluation.labels is None else np.array(evaluation.labels)
    return EvalPrediction(predictions=np.array(padded), label_ids=labels)
