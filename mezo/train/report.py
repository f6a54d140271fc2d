"""What a run shows and leaves behind: a progress bar, a plot of its losses, JSON files."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from mezo.checkpoint.atomic import replace_file

_RUNNING_MEAN_SHARE = 20  # the running mean spans a twentieth of the run, at least two steps


@dataclass(frozen=True)
class StepPoint:
    """One training step in a plot.

    Args:
        step: steps taken, this one included.
        seconds: since training began.
        loss: mean of loss_plus and loss_minus, nats.
        projected_grad: the estimate, mean over directions.
    """

    step: int
    seconds: float
    loss: float
    projected_grad: float


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation on held-out examples in a plot.

    Args:
        step: steps taken before it.
        seconds: since training began.
        loss: nats.
        accuracy: share of right answers, or None where there is no such thing.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float | None


class ProgressBar:
    """Shows how far a run is: a bar on a terminal, now and then a plain line elsewhere.

    Args:
        total: steps of the whole run.
        start: steps taken before; a resumed run's time left is judged by its own steps.
        every: steps between plain lines; the first and the last step always have one.
        label: one word in front.
        stream: where to write, default ``sys.stdout``.

    Raises:
        ValueError: ``total`` or ``every`` < 1, ``start`` outside of [0, total].

    Example:
        >>> with ProgressBar(100) as bar:
        ...     bar.update(step=1, seconds=0.5, loss=0.69, projected_grad=-0.2, tokens_per_s=300.0)
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every: int = 20,
        label: str = "step",
        stream: TextIO | None = None,
    ) -> None:
        if total < 1 or every < 1 or not 0 <= start <= total:
            raise ValueError(
                "ProgressBar: total and every must be at least 1 and start in [0, total], got "
                f"total {total}, every {every}, start {start}; pass the number of steps of the run."
            )
        self.total, self.start, self.every, self.label = total, start, every, label
        self.stream = sys.stdout if stream is None else stream
        self._has_line = False
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self.stream.isatty():
            self._bar = Progress(
                TextColumn(label),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
                console=Console(file=self.stream),
                expand=True,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, numbers="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, *, step: int, seconds: float, loss: float, projected_grad: float, tokens_per_s: float
    ) -> None:
        """Show a step.

        Args:
            step: steps taken so far, this one included.
            seconds: spent in this run's steps so far; the time left is judged by it.
            loss: nats.
            projected_grad: the estimate, mean over directions.
            tokens_per_s: tokens the engine computed per second.
        """
        left = seconds / max(step - self.start, 1) * (self.total - step)
        numbers = (
            f"loss {loss:.4f}  projected_grad {projected_grad:+.3g}  {tokens_per_s:.0f} tokens/s  "
            f"{_duration(left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif not self._has_line or step % self.every == 0 or step == self.total:
            width = len(str(self.total))
            self._has_line = True
            self.write(f"{self.label} {step:>{width}}/{self.total}  {numbers}")

    def write(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


def _duration(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def plot_losses(
    path: Path,
    steps: Sequence[StepPoint],
    evals: Sequence[EvalPoint],
    *,
    title: str,
    label_text: str,
) -> Path:
    """Draw a run as a PNG: losses above, held-out accuracy below.

    Args:
        path: the file to write; its directory is made.
        steps: training steps; may be empty if there are evaluations.
        evals: evaluations; without accuracies the lower panel is left out.
        title: what the run is, one line.
        label_text: how it was made (model, settings, device), one or two lines below the panels.

    Returns:
        ``path``.

    Raises:
        ValueError: neither steps nor evaluations.
        RuntimeError: matplotlib is not installed.
    """
    if not steps and not evals:
        raise ValueError(
            "plot_losses: steps or evals must hold at least one point, got none; "
            "plot after the first step."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "plot_losses: matplotlib must be installed, got none; "
            "run pip install 'mezo-sglang[plots]'."
        ) from error
    scored = [(e.step, e.accuracy) for e in evals if e.accuracy is not None]
    num_panels = 2 if scored else 1
    # Figure and canvas by hand: pyplot would keep global state and look for a display.
    figure = Figure(figsize=(8.0, 3.6 + 2.4 * (num_panels - 1)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        num_panels, 1, sharex=True, squeeze=False, height_ratios=[3, 2][:num_panels]
    )[:, 0]
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.supxlabel(label_text, fontsize=8.5, color="0.35")
    _draw_losses(axes[0], steps, evals)
    if scored:
        _draw_accuracy(axes[1], scored)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def running_mean(values: Sequence[float], span: int) -> list[float]:
    """Return the mean of the last ``span`` finite values at each place; NaN before the first one.

    Raises:
        ValueError: ``span`` < 1.
    """
    if span < 1:
        raise ValueError(f"running_mean: span must be at least 1, got {span}; pass 1 for no mean.")
    means = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(0, end - span) : end] if math.isfinite(v)]
        means.append(math.fsum(window) / len(window) if window else math.nan)
    return means


def _draw_losses(axes: Any, steps: Sequence[StepPoint], evals: Sequence[EvalPoint]) -> None:
    """The upper panel."""
    if steps:
        xs, ys = [p.step for p in steps], [p.loss for p in steps]
        span = max(2, len(steps) // _RUNNING_MEAN_SHARE)
        axes.plot(xs, ys, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
        axes.plot(
            xs[span - 1 :],
            running_mean(ys, span)[span - 1 :],
            color="tab:blue",
            linewidth=1.6,
            label=f"training, mean of {span} steps",
        )
    if evals:
        axes.plot(
            [e.step for e in evals],
            [e.loss for e in evals],
            color="tab:red",
            marker="o",
            markersize=4.5,
            linewidth=1.2,
            label="held out",
        )
    axes.set_ylabel("cross-entropy (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8.5)


def _draw_accuracy(axes: Any, scored: Sequence[tuple[int, float]]) -> None:
    """The lower panel."""
    axes.plot(
        [step for step, _ in scored],
        [100.0 * accuracy for _, accuracy in scored],
        color="tab:green",
        marker="o",
        markersize=4.5,
        linewidth=1.2,
        label="held out",
    )
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8.5, loc="lower right")


def write_json(path: Path, data: Any) -> Path:
    """Write JSON, sorted and indented; the file is either the old one or the whole new one.

    Args:
        path: the file; its directory is made.
        data: what `json` takes, and besides: dataclasses, paths, and numbers that are not finite,
            which become null because JSON has no word for them.

    Returns:
        ``path``.

    Raises:
        TypeError: a value that JSON cannot hold; the file is left as it was.
    """
    text = json.dumps(plain(data), indent=2, sort_keys=True, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())
    return path


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's types; numbers that are not finite become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
