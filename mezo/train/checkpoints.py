"""Snapshots of the adapter while it is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mezo.checkpoint.run_directory import has_adapter
from mezo.run import Run


class Checkpoints:
    """Writes ``checkpoint-STEP`` directories with PEFT's two files, and removes old ones.

    Args:
        directory: where they are made.
        every: steps between them; None: only where `save` is called.
        keeps_best: whether each new best adapter gets one.
        limit: how many of this training to keep, or None for all; the best one stays.
        before: called before one is written: what it depends on has to be on the disk.
        num_steps: steps of the training that were taken before: checkpoints of these are its own.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int | None = None,
        limit: int | None = None,
        keeps_best: bool = False,
        before: Callable[[], None] | None = None,
        num_steps: int = 0,
    ) -> None:
        self.directory, self.every, self.limit = directory, every, limit
        self.keeps_best = keeps_best
        self._before = before
        self._made: list[tuple[int, Path]] = []
        for path in directory.glob("checkpoint-*"):
            step = path.name.removeprefix("checkpoint-")
            if step.isdecimal() and 0 < int(step) <= num_steps and has_adapter(path):
                self._made.append((int(step), path))
        self._made.sort()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs behind ``step`` steps."""
        return self.every is not None and step % self.every == 0

    def save(self, run: Run, step: int, *, best: int | None = None) -> Path:
        """Write a checkpoint.

        Args:
            run: the run.
            step: steps taken.
            best: the step whose checkpoint is the best one.

        Returns:
            Its directory.

        Raises:
            OSError: it cannot be written.
        """
        path = self.directory / f"checkpoint-{step}"
        if all(made != step for made, _ in self._made):
            if self._before is not None:
                self._before()
            run.save(path)
            self._made.append((step, path))
        while self.limit is not None and len(self._made) > self.limit:
            old = next((entry for entry in self._made[:-1] if entry[0] != best), None)
            if old is None:
                break
            self._made.remove(old)
            shutil.rmtree(old[1], ignore_errors=True)
        return path
