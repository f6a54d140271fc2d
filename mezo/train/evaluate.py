"""Evaluation on held-out batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mezo.data.batch import Batch, EncodedBatch
from mezo.results import EvalResult
from mezo.run import Run


def evaluate(
    run: Run, batches: Iterable[Batch | EncodedBatch], *, base: bool = False
) -> EvalResult:
    """Score batches under the run's current adapter or the base model, pooled by `pool`.

    Raises:
        ValueError: a bad batch.
    """
    return pool([run.evaluate(batch, base=base) for batch in batches])


def pool(parts: Sequence[EvalResult]) -> EvalResult:
    """Pool evaluations of several batches: what one batch of all their examples would give.

    Losses weigh as many tokens as they are means of, or else examples.
    """
    n = sum(p.num_examples for p in parts)
    weights = [p.num_examples if p.loss_tokens is None else p.loss_tokens for p in parts]
    counts = [p.loss_tokens for p in parts if p.loss_tokens is not None]
    is_classification = all(p.predictions is not None for p in parts)
    is_scored = is_classification and all(p.accuracy is not None for p in parts)
    return EvalResult(
        loss=sum(p.loss * weight for p, weight in zip(parts, weights, strict=True)) / sum(weights),
        accuracy=sum((p.accuracy or 0.0) * p.num_examples for p in parts) / n
        if is_scored
        else None,
        predictions=[g for p in parts for g in p.predictions or ()] if is_classification else None,
        num_examples=n,
        tokens=sum(p.tokens for p in parts),
        num_nonfinite=sum(p.num_nonfinite for p in parts),
        scores=[s for p in parts for s in p.scores or ()],
        labels=[x for p in parts for x in p.labels or ()] if is_classification else None,
        loss_tokens=sum(counts) if counts else None,
    )
