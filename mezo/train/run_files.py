"""What `mezo train` writes beside the adapter: the log, the plot and the summary."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mezo.checkpoint.atomic import write_file
from mezo.checkpoint.records import JsonLines, write_json
from mezo.config import MeZOConfig, TrainConfig
from mezo.results import EvalResult
from mezo.settings import as_yaml
from mezo.train.callbacks import Listener, Progress
from mezo.train.examples import TrainingExamples
from mezo.train.logged import fields_of
from mezo.train.model_card import model_card, write_results
from mezo.train.plots import EvalPoint, StepPoint, plot_losses
from mezo.train.progress import ProgressBar
from mezo.train.resume import Past
from mezo.train.trainer import MeZOTrainer

# All files of a training beside the adapter.
FILES = (
    *("summary.json", "steps.jsonl", "loss.png", "all_results.json", "run.yaml", "README.md"),
    *("trajectory.mezo", "evaluations.jsonl"),
)


def can_plot() -> bool:
    """Return whether matplotlib is there; if not, say so now and not after the training."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("There will be no loss.png: run pip install 'mezo-sglang[plots]' for matplotlib.")
        return False
    return True


class TrainingLog(Listener):
    """Shows progress, writes steps.jsonl and keeps the points of the plot.

    Args:
        settings: of the training.
        config: of the run.
        model: directory or name of the model.
        can_plot: whether to draw loss.png.
        past: what was done before a training that goes on; None: nothing.
    """

    def __init__(
        self,
        settings: TrainConfig,
        config: MeZOConfig,
        model: str,
        *,
        can_plot: bool,
        past: Past | None = None,
    ) -> None:
        self._settings = settings
        self._can_plot = can_plot
        self.has_plot = False
        self._bar: ProgressBar | None = None
        self._num_steps = 0
        self._seconds_before = 0.0
        self._lines: JsonLines | None = None
        self._steps: list[StepPoint] = []
        self.evaluations: list[EvalPoint] = []
        self.problems: list[str] = []
        self._past = past
        self._label = (
            f"{Path(model).name} on {data_name(settings)}, engine {settings.engine}, "
            f"prefix {config.prefix}, seed {config.seed}"
        )

    def begin(self, num_steps: int) -> None:
        """See `Listener.begin`."""
        self._num_steps = num_steps
        kept = [] if self._past is None else self._past.step_records
        self._lines = JsonLines(self._settings.output / "steps.jsonl", kept)
        start = 0 if self._past is None else self._recall(self._past)
        self._bar = ProgressBar(
            num_steps, start=min(start, num_steps), every=self._settings.logging_steps
        )
        self._bar.__enter__()

    def _recall(self, past: Past) -> int:
        """Take over the points of the steps that were taken before; returns their number."""
        at, seconds = {0: 0.0}, 0.0
        for result, _ in past.steps:
            seconds += result.timings["total"]
            at[result.step + 1] = seconds
            grads = result.projected_grads or (float("nan"),)
            grad = sum(grads) / len(grads)
            self._steps.append(StepPoint(result.step + 1, seconds, result.loss, grad))
        for step, scores in sorted(past.evaluations.items()):
            self.evaluations.append(EvalPoint(step, at[step], scores.loss, scores.accuracy))
        self._seconds_before = seconds
        return past.num_steps

    def end(self) -> None:
        """See `Listener.end`."""
        if self._bar is not None:
            self._bar.__exit__()
        if self._lines is not None:
            self._lines.close()

    def __call__(self, progress: Progress) -> None:
        """Note a step or an evaluation."""
        assert self._bar is not None
        if progress.evaluation is not None:
            scores = progress.evaluation
            self.evaluations.append(
                EvalPoint(progress.step, progress.seconds, scores.loss, scores.accuracy)
            )
            self._bar.write(f"held out, after {progress.step} steps: {_score_words(scores)}")
        if progress.result is not None:
            result = progress.result
            grads = result.projected_grads or (float("nan"),)
            grad = sum(grads) / len(grads)
            self._steps.append(StepPoint(progress.step, progress.seconds, result.loss, grad))
            self._bar.update(
                step=progress.step,
                seconds=progress.seconds - self._seconds_before,
                loss=result.loss,
                projected_grad=grad,
                tokens_per_s=result.tokens / result.timings["total"],
            )
            self._write(fields_of(result, progress.lr))

    def _write(self, record: dict[str, Any]) -> None:
        """Add a line to steps.jsonl; a disk that is full ends the log, not the training."""
        assert self._lines is not None
        try:
            self._lines.write(record)
        except OSError as error:
            self.problems.append(f"steps.jsonl ends at step {record['step']}: {error}.")
            if self._bar is not None:
                self._bar.write(self.problems[-1])

    def plot(self) -> None:
        """Draw loss.png if that is possible."""
        if self._can_plot:
            plot_losses(
                self._settings.output / "loss.png",
                self._steps,
                self.evaluations,
                title=f"MeZO, {self._num_steps} steps",
                label_text=self._label,
            )
            self.has_plot = True


def _score_words(scores: EvalResult) -> str:
    """An evaluation in one line."""
    accuracy = "none" if scores.accuracy is None else f"{scores.accuracy:.3f}"
    unscored = f", {scores.num_nonfinite} without a finite score" if scores.num_nonfinite else ""
    more = "".join(f", {name} {value:.3f}" for name, value in scores.metrics.items())
    return (
        f"cross-entropy {scores.loss:.4f} nats, accuracy {accuracy}{more} ({scores.num_examples} "
        f"examples{unscored})"
    )


def record_of(
    settings: TrainConfig,
    trainer: MeZOTrainer,
    log: TrainingLog,
    examples: TrainingExamples,
    scores_by_when: Mapping[str, EvalResult],
    *,
    model: str,
    is_best_loaded: bool,
) -> dict[str, Any]:
    """Return what summary.json holds.

    Args:
        settings: of the training.
        trainer: has ended.
        log: has listened to it.
        examples: trained on.
        scores_by_when: {"before", "after"}: evaluations on other examples than the trainer's.
        model: directory or name.
        is_best_loaded: whether the saved adapter is the best one, put back behind the last step.
    """
    from mezo import __version__

    summary, config = trainer.summary, trainer.run.config

    def scores(result: EvalResult | None) -> dict[str, Any] | None:
        if result is None:
            return None
        return {
            "accuracy": result.accuracy,
            "cross_entropy": result.loss,
            "num_examples": result.num_examples,
            "num_nonfinite": result.num_nonfinite,
            **result.metrics,
        }

    before, after = (
        scores_by_when.get(when, getattr(summary, when)) for when in ("before", "after")
    )
    best, train = trainer.best, examples.train

    return {
        "completed": summary.steps == summary.num_steps and trainer.is_finished,
        "held_out": {"before": scores(before), "after": scores(after)},
        "asks": examples.asks,
        "batch_size": settings.examples_per_step,
        "best": best and {"step": best.step, "metric": best.metric, "value": best.value},
        "is_best_loaded": is_best_loaded,
        "config": dataclasses.asdict(config),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "engine": settings.engine,
        "evaluations": log.evaluations,
        "host": {"machine": platform.machine(), "python": platform.python_version()},
        "lost_share": summary.lost_share,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "data": data_name(settings),
        "label_names": examples.label_names,
        "options": examples.options(),
        "metric": examples.metric,
        "model": Path(model).name,
        "model_path": model,
        "model_revision": settings.model_revision,
        "num_steps": summary.num_steps,
        "problems": [*summary.problems, *log.problems],
        "schedule": settings.schedule,
        "seconds_per_step": summary.seconds / max(summary.steps, 1),
        "seed": config.seed,
        "skipped_steps": summary.skipped,
        "statuses": summary.statuses,
        "steps": summary.steps,
        "task": settings.task,
        "tokens_computed": summary.tokens,
        "prompt_tokens_computed": summary.prompt_tokens,
        "prompt_tokens_reused": summary.reused_tokens,
        "tokens_per_second": summary.tokens / summary.seconds if summary.seconds else None,
        "train_examples": len(train) if isinstance(train, Sequence) else None,
        "trust_remote_code": settings.trust_remote_code,
        "versions": {"mezo-sglang": __version__, **trainer.run.session.versions},
    }


def closing_words(record: dict[str, Any], output: Path, *, has_plot: bool) -> str:
    """Say what was reached, where it is, and why not to trust it."""
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    step = record["best"]["step"] if record["is_best_loaded"] else None

    def number(value: float | None, digits: int) -> str:
        return "none" if value is None else f"{value:.{digits}f}"

    lines = [f"{record['steps']} steps of {record['seconds_per_step']:.2f} s."]
    if before is not None and after is not None:
        lines = [
            f"Held-out cross-entropy {number(before['cross_entropy'], 4)} -> "
            f"{number(after['cross_entropy'], 4)} nats, accuracy "
            f"{number(before['accuracy'], 3)} -> {number(after['accuracy'], 3)} "
            f"({after['num_examples']} examples), {lines[0]}"
        ]
    if step is not None:
        lines.append(f"The adapter is that of step {step}, the best one.")
    lines += [
        f"Wrote {output}/adapter, summary.json{', ' if has_plot else ' and '}steps.jsonl"
        f"{' and loss.png' if has_plot else ''}.",
        *(f"Problem: {problem}" for problem in record["problems"]),
    ]
    return "\n".join(lines)


def data_name(settings: TrainConfig) -> str:
    """What was trained on, in a word."""
    return settings.task or (Path(settings.data).name if settings.data else "data in memory")


def leave_files(
    settings: TrainConfig, config: MeZOConfig, record: dict[str, Any], log: TrainingLog
) -> None:
    """Write all but the adapter; what fails is said, and added to the record's problems."""
    output = settings.output

    run_yaml = as_yaml(settings, config)
    card = model_card(record, run_yaml)

    def write_summary() -> None:
        write_json(output / "summary.json", record)

    failed = [
        _tried(write_summary, "summary.json"),
        _tried(log.plot, "loss.png"),
        _tried(lambda: write_results(output, record), "all_results.json"),
        _tried(lambda: write_file(output / "run.yaml", run_yaml.encode()), "run.yaml"),
        _tried(lambda: write_file(output / "README.md", card.encode()), "README.md"),
    ]
    if problems := [sentence for sentence in failed if sentence]:
        record["problems"] += problems
        _tried(write_summary, "summary.json")


def _tried(write: Callable[[], object], name: str) -> str | None:
    """Write a file; returns a sentence, also printed, if that fails."""
    try:
        write()
    except Exception as error:
        sentence = f"{name} could not be written: {type(error).__name__}: {error}."
        with suppress(OSError):
            print(sentence, file=sys.stderr)
        return sentence
    return None
