"""Going on with a training: what it had done, and whether this one continues it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo._inputs import require, shown
from mezo.checkpoint.records import read_json_lines
from mezo.checkpoint.replayed import weights_at
from mezo.checkpoint.run_directory import EVALUATIONS, TRAJECTORY, has_adapter
from mezo.checkpoint.trajectory import Header, Trajectory, read
from mezo.checkpoint.trajectory_writer import remove
from mezo.config import MeZOConfig, TrainConfig
from mezo.results import EvalResult, StepResult
from mezo.settings import OF_THE_COMMAND, fields, saved_settings
from mezo.train.best import Best
from mezo.train.logged import evaluation_of, fields_of, step_from_trajectory, step_of

AUTO = "auto"

# What theta and its directions are functions of: another value is another run.
_FIXED = (
    *("rank", "alpha", "target_modules", "seed", "num_directions", "distribution", "prefix"),
    *("invocation", "optimizer", "estimator"),
)
# What steps do not depend on, beyond what engines differ by themselves.
_FREE = (
    *("output", "model", "engine", "engine_args", "threads", "max_tokens_per_forward", "name"),
    *("trust_remote_code", "eval_data", "test_split", "metric", "eval_examples", "logging_steps"),
    *("eval_batch_size", "eval_every", "eval_strategy", "save_every", "save_strategy", "run_name"),
    *("save_total_limit", "load_best", "best_metric", "greater_is_better", "patience", "report_to"),
    *("push_to_hub", "hub_model_id", "resume_from_checkpoint", "at", "allow_change"),
    *("overwrite_output_dir", "max_skipped_steps"),
)


@dataclass(frozen=True)
class Past:
    """What a training had done until the step from which it goes on.

    Args:
        source: its directory.
        trajectory: its steps, all of them.
        num_steps: the steps taken from it, the first ones.
        steps: their results and learning rates, as far as the logs have them.
        step_records: their lines of steps.jsonl.
        evaluations: {steps taken before: evaluation}.
        evaluation_records: their lines of evaluations.jsonl.
    """

    source: Path
    trajectory: Trajectory
    num_steps: int
    steps: list[tuple[StepResult, float | None]]
    step_records: list[dict[str, Any]]
    evaluations: dict[int, EvalResult]
    evaluation_records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def header(self) -> Header:
        """What the trajectory says of the run."""
        return self.trajectory.header

    def coefficients(self) -> list[tuple[float, ...]]:
        """The coefficients of its steps."""
        return [record.coefficients for record in self.trajectory.records[: self.num_steps]]


def past_of(settings: TrainConfig) -> Past | None:
    """Return what a training goes on from, or None for one that begins.

    Raises:
        ValueError: there is nothing to go on from, ``at`` is behind its end, or the output
            directory holds another training that would be overwritten.
    """
    own, source = settings.output / TRAJECTORY, settings.resume_from_checkpoint
    if source == AUTO:
        source = str(settings.output) if own.exists() else None
    if source is None:
        _check_free(settings)
        return None
    path = Path(source) if Path(source).name == TRAJECTORY else Path(source) / TRAJECTORY
    directory = path.parent
    require(
        path.is_file(),
        f"train: resume_from_checkpoint must be {AUTO} or a run's directory with {TRAJECTORY}, got "
        f"{source}; pass the output of the training that was stopped.",
    )
    is_same = own.exists() and own.samefile(path)
    if not is_same:
        _check_free(settings)
    trajectory = read(path)
    count = len(trajectory.records)
    at = count if settings.at is None else settings.at
    require(
        at <= count,
        f"train: at must be at most the {count} steps of {path}, got {at}; choose one of them.",
    )
    require(
        at == count or not is_same,
        f"train: at {at} must come with another output directory, got {settings.output}, whose "
        f"{count} steps are never overwritten; pass output_dir.",
    )
    return _past(directory, trajectory, at)


def _past(directory: Path, trajectory: Trajectory, at: int) -> Past:
    """Read the logs beside a trajectory; what they lack is said by the trajectory."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_json_lines(directory / "steps.jsonl"):
        if isinstance(record.get("step"), int) and record["step"] < at:
            by_step[record["step"]] = record
    for taken in trajectory.records[:at]:
        # A line that was not written before the process was killed.
        by_step.setdefault(taken.step, fields_of(step_from_trajectory(taken), None))
    steps = [step_of(by_step[step]) for step in range(at)]
    evaluations = {
        record["step"]: record
        for record in read_json_lines(directory / EVALUATIONS)
        if isinstance(record.get("step"), int) and record["step"] <= at
    }
    return Past(
        directory,
        trajectory,
        at,
        steps,
        [by_step[step] for step in sorted(by_step)],
        {step: evaluation_of(record) for step, record in evaluations.items()},
        list(evaluations.values()),
    )


def _check_free(settings: TrainConfig) -> None:
    """Raise where an output has a training already that is not to be overwritten."""
    path = settings.output / TRAJECTORY
    require(
        not path.exists() or settings.overwrite_output_dir or not len(read(path).records),
        f"output: {settings.output} must not have a training already, got one with {TRAJECTORY}; "
        f"pass resume_from_checkpoint={AUTO} to go on with it, overwrite_output_dir to begin anew, "
        "or another directory.",
    )


def make_room(output: Path) -> None:
    """Remove what an earlier training has left, now that another one begins.

    Raises:
        ValueError: it is still running.
    """
    path = output / TRAJECTORY
    if not path.exists():
        return
    remove(path)
    for checkpoint in output.glob("checkpoint-*"):
        if has_adapter(checkpoint):
            shutil.rmtree(checkpoint)
    for name in ("steps.jsonl", EVALUATIONS):
        (output / name).unlink(missing_ok=True)


def recall_best(best: Best, past: Past) -> None:
    """Let the choice of the best adapter know the evaluations that were, and replay its weights."""
    for step, evaluation in sorted(past.evaluations.items()):
        best.judge(step, evaluation)
    if best.step is not None:
        best.weights = weights_at(past.trajectory, best.step)


def check_continues(
    past: Past,
    settings: TrainConfig,
    now: Mapping[str, Any],
    *,
    model: Mapping[str, str],
    data: Mapping[str, str],
) -> None:
    """Raise unless a training continues the past one.

    Args:
        past: from `past_of`.
        settings: of this training.
        now: the same with the run's, by name, without defaults: what run.yaml gets.
        model: what identifies the model, see `mezo.checkpoint.identity`.
        data: what identifies the training examples.

    Raises:
        ValueError: the list of what differs.
    """
    before = saved_settings(past.source)
    differing = _differing(before, now)
    fixed = [line for name, line in differing.items() if name in _FIXED]
    require(
        not fixed,
        f"train: a training that goes on must have the settings of {past.source}, got "
        f"{'; '.join(fixed)}; leave them out, or train from the beginning.",
    )
    for what, known, got in (("model", past.header.model, model), ("data", past.header.data, data)):
        others = [name for name in known if name in got and known[name] != got[name]]
        require(
            not others or (what == "data" and settings.allow_change),
            f"train: the {what} must be that of {past.source}, got another one "
            f"({', '.join(others)} differ); "
            + ("restore it." if what == "model" else "restore it, or pass allow_change."),
        )
    changed = [line for name, line in differing.items() if name not in (*_FIXED, *_FREE)]
    require(
        not changed or settings.allow_change,
        f"train: a training that goes on must have the settings of {past.source}, got "
        f"{'; '.join(changed)}; leave them out, or pass allow_change.",
    )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{setting: "name: then -> now"} of those that differ."""
    classes = (TrainConfig, MeZOConfig)
    defaults = {f.name: f.default for cls in classes for f in dataclasses.fields(cls)}
    then = {fields()[name][1].name: value for name, value in before.items() if name in fields()}
    found = {}
    for name, default in defaults.items():
        old, new = _plain(then.get(name, default)), _plain(now.get(name, default))
        if old != new and name not in OF_THE_COMMAND:
            found[name] = f"{name} {shown(new)} instead of {shown(old)}"
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
