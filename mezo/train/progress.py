"""Shows how far a run is: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


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
