"""`plot_runs`: what the logs of one or several runs say, in one plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo._inputs import require
from mezo.checkpoint.run_directory import read_summary
from mezo.train.plots import new_figure, write_png

_MEAN_SHARE = 20  # the running mean spans a twentieth of a run, at least two steps
_MOST_POINTS = 1000  # of one line; a panel is not as many pixels wide


@dataclass(frozen=True)
class RunLog:
    """What a run's files say.

    Args:
        name: of the run's directory.
        steps: the lines of steps.jsonl.
        evaluations: of summary.json; empty where the training has not ended.
    """

    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def read_log(run: str | Path) -> RunLog:
    """Read steps.jsonl and, if it is there, summary.json of a run's directory.

    A last line that was cut off is left out: a training may still be writing it.

    Raises:
        ValueError: no log, one without a step, or one that is no log of steps.
    """
    path = Path(run) / "steps.jsonl"
    require(
        path.is_file(),
        f"plot: {path} must be a file, got none; pass the output directories of trainings.",
    )
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append({"loss": None, **dict(json.loads(line))})
        except (ValueError, TypeError) as error:
            require(
                number == len(lines),
                f"plot: line {number} of {path} must be a JSON object, got {line[:40]!r}; copy the "
                f"log again ({error}).",
            )
    require(
        bool(steps) and all(isinstance(step.get("step"), int) for step in steps),
        f"plot: {path} must have a line with 'step' for each step, got {len(steps)} lines"
        f"{' without it' if steps else ''}; plot after the first step.",
    )
    has_summary = (Path(run) / "summary.json").is_file()
    evaluations = read_summary(run).get("evaluations") if has_summary else None
    return RunLog(Path(run).resolve().name, steps, evaluations or [])


def plot_runs(runs: Sequence[str | Path], path: str | Path = "plot.png") -> Path:
    """Draw one or several runs as a PNG.

    The panels are training loss (running mean over a twentieth of the run) with held-out loss as
    points, held-out accuracy, abs(projected_grad) and signal-to-noise (running means of the means
    over directions). A panel for which no run has numbers is left out.

    Args:
        runs: output directories of trainings.
        path: the file to write; its directory is made.

    Returns:
        ``path``.

    Raises:
        ValueError: no run, or see `read_log`.
        RuntimeError: matplotlib is not installed.
    """
    require(len(runs) > 0, "plot: there must be a run, got none; pass a training's directory.")
    logs = [read_log(run) for run in runs]
    names = _distinct(runs, logs)
    panels = [panel for panel in _PANELS if any(panel.has(log) for log in logs)]
    figure = new_figure(0.8 + 2.4 * len(panels), "plot")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for i, (name, log) in enumerate(zip(names, logs, strict=True)):
            panel.draw(axis, log, name, f"C{i % 10}")
        axis.set_ylabel(panel.label)
        axis.grid(alpha=0.3)
        if panel.is_log:
            axis.set_yscale("log", nonpositive="mask")
    axes[0].legend(fontsize=8.5)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return write_png(figure, Path(path))


def thinned(points: Sequence[Any], most: int = _MOST_POINTS) -> list[Any]:
    """Return at most ``most`` points at even distances, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[i * (len(points) - 1) // (most - 1)] for i in range(most)]


def _distinct(runs: Sequence[str | Path], logs: Sequence[RunLog]) -> list[str]:
    """Names of runs for the legend: of the directories, or the paths where these are the same."""
    names = [log.name for log in logs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _mean(values: Any, of: Callable[[float], float] = float) -> float:
    """The mean of a step's values that are there; NaN without any."""
    found = [of(v) for v in values or () if v is not None]
    return math.fsum(found) / len(found) if found else math.nan


@dataclass(frozen=True)
class _Panel:
    """A panel of the plot.

    Args:
        label: of its vertical axis.
        of_step: a line of the log -> a number of the line, NaN for none; None: no line.
        of_evaluation: name of the number of an evaluation that is a point, or None.
        is_log: whether the axis is logarithmic.
    """

    label: str
    of_step: Callable[[dict[str, Any]], float] | None
    of_evaluation: str | None = None
    is_log: bool = False

    def lines(self, log: RunLog) -> list[float]:
        """A number of each step."""
        return [] if self.of_step is None else [self.of_step(step) for step in log.steps]

    def points(self, log: RunLog) -> list[tuple[int, float]]:
        """(Step, number) of each evaluation that has it."""
        name = self.of_evaluation
        found = [] if name is None else [(e["step"], e.get(name)) for e in log.evaluations]
        return [(step, value) for step, value in found if value is not None]

    def has(self, log: RunLog) -> bool:
        """Whether there is something to draw."""
        return any(map(math.isfinite, self.lines(log))) or bool(self.points(log))

    def draw(self, axis: Any, log: RunLog, name: str, color: str) -> None:
        """Draw a run's line and points."""
        values = self.lines(log)
        if values:
            span = max(2, len(values) // _MEAN_SHARE)
            # Until the first whole span, the mean of what is there: short runs have a line, too.
            line = []
            for i in thinned(range(len(values))):
                last = filter(math.isfinite, values[max(0, i + 1 - span) : i + 1])
                line.append((log.steps[i]["step"] + 1, _mean(last)))
            axis.plot(*zip(*line, strict=True), color=color, linewidth=1.3, label=name)
        if points := self.points(log):
            style = "o" if values else "o-"
            label = f"{name}, held out" if values else None
            axis.plot(*zip(*points, strict=True), style, color=color, markersize=4.5, label=label)


_PANELS = (
    _Panel("loss (nats)", lambda step: _mean([step["loss"]]), "loss"),
    _Panel("held-out accuracy", None, "accuracy"),
    _Panel("|projected_grad|", lambda step: _mean(step.get("projected_grads"), abs), is_log=True),
    _Panel("signal_to_noise", lambda step: _mean(step.get("signal_to_noise"))),
)
