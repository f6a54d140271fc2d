"""A plot of a run's losses and accuracies."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo.checkpoint.atomic import write_file

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
        accuracy: share of right answers, or None where there are no right answers.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float | None


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
    scored = [(e.step, e.accuracy) for e in evals if e.accuracy is not None]
    num_panels = 2 if scored else 1
    figure = new_figure(3.6 + 2.4 * (num_panels - 1), "plot_losses")
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
    return write_png(figure, path)


def new_figure(height: float, who: str) -> Any:
    """Return an empty figure, 8 inches wide.

    Args:
        height: in inches.
        who: the caller, for the error.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            f"{who}: matplotlib must be installed, got none; run pip install 'mezo-sglang[plots]'."
        ) from error
    # Figure and canvas by hand: pyplot would keep global state and look for a display.
    figure = Figure(figsize=(8.0, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, path: Path) -> Path:
    """Write a figure as a PNG; returns ``path``."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return write_file(Path(path), image.getvalue())


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
