"""What a step and an evaluation are called in logs: the names that TRL uses, and ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mezo.results import EvalResult
from mezo.train.callbacks import Progress


def step_record(progress: Progress, *, num_tokens: int, loss: float) -> dict[str, Any]:
    """Return a step's values by the names under which trackers show them.

    Args:
        progress: after a step.
        num_tokens: tokens computed in all steps so far.
        loss: mean of the steps since the record before, as in Hugging Face's trainers; what else
            there is of a step is the last one's.
    """
    result = progress.result
    assert result is not None
    noise = [x for x in result.signal_to_noise if x is not None]
    record = {
        "loss": loss,
        "learning_rate": progress.lr,
        "epoch": progress.epoch,
        "num_tokens": num_tokens,
        "step_time": result.timings["total"],
        "projected_grad": _mean(result.projected_grads),
        "signal_to_noise": _mean(noise),
        "prompt_tokens_reused": result.reused_tokens,
    }
    return {name: value for name, value in record.items() if value is not None}


def finite_mean(losses: Sequence[float]) -> float:
    """Return the mean of the finite values; NaN without any."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def evaluation_record(evaluation: EvalResult) -> dict[str, float]:
    """Return an evaluation's values as eval_loss, eval_accuracy and so on."""
    values = {"loss": evaluation.loss, "accuracy": evaluation.accuracy, **evaluation.metrics}
    return {f"eval_{name}": value for name, value in values.items() if value is not None}


def _mean(values: Any) -> float | None:
    return sum(values) / len(values) if len(values) else None
