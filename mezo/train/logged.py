"""Steps and evaluations from the records of their logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mezo.checkpoint.trajectory import StepRecord
from mezo.results import EvalResult, StepResult, StepStatus
from mezo.train.callbacks import Progress


def evaluation_fields(progress: Progress) -> dict[str, Any]:
    """What evaluations.jsonl holds of an evaluation; see `evaluation_of`."""
    result = progress.evaluation
    assert result is not None
    return {
        "step": progress.step,
        "seconds": progress.seconds,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "num_examples": result.num_examples,
        "num_nonfinite": result.num_nonfinite,
        "tokens": result.tokens,
        "is_classification": result.predictions is not None,
        "metrics": result.metrics,
    }


def evaluation_of(record: Mapping[str, Any]) -> EvalResult:
    """The evaluation of a record, without its single predictions and scores."""
    loss = record["loss"]
    return EvalResult(
        loss=float("nan") if loss is None else loss,
        accuracy=record["accuracy"],
        predictions=[] if record["is_classification"] else None,
        num_examples=record["num_examples"],
        tokens=record["tokens"],
        num_nonfinite=record["num_nonfinite"],
        metrics={k: float("nan") if v is None else v for k, v in record["metrics"].items()},
    )


def fields_of(result: StepResult, lr: float | None) -> dict[str, Any]:
    """What steps.jsonl holds of a step; see `step_of`."""
    return {**dataclasses.asdict(result), "status": result.status.name, "lr": lr}


def step_of(record: Mapping[str, Any]) -> tuple[StepResult, float | None]:
    """A step's result and its learning rate, from a record of steps.jsonl."""
    known = {field.name for field in dataclasses.fields(StepResult)}
    values = {name: value for name, value in record.items() if name in known}
    nan = float("nan")
    for name in ("loss", "loss_plus", "loss_minus"):
        values[name] = nan if values[name] is None else values[name]
    values["losses"] = tuple(
        tuple(nan if x is None else x for x in pair) for pair in values["losses"]
    )
    for name in ("projected_grads", "coefficients", "signal_to_noise"):
        values[name] = tuple(values[name])
    values["status"] = StepStatus[values["status"]]
    return StepResult(**values), record.get("lr")


def step_from_trajectory(record: StepRecord) -> StepResult:
    """A step's result as far as a trajectory knows it: nothing is said of tokens and seconds."""
    plus, minus = (sum(pair[i] for pair in record.losses) / len(record.losses) for i in (0, 1))
    return StepResult(
        step=record.step,
        loss=0.5 * (plus + minus),
        loss_plus=plus,
        loss_minus=minus,
        losses=record.losses,
        projected_grads=(),
        coefficients=record.coefficients,
        signal_to_noise=(),
        status=StepStatus[record.status],
        tokens=0,
        prompt_tokens=0,
        reused_tokens=0,
        forwards=0,
        timings={"total": 0.0, "weights": 0.0, "score": 0.0},
    )
