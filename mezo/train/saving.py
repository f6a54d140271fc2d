"""Keeps what was trained, whatever ends a training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mezo.run import Run

if TYPE_CHECKING:
    from mezo.train.summary import TrainSummary
    from mezo.train.trainer import MeZOTrainer


@dataclass(frozen=True)
class PartialTraining:
    """What is left of a training that was stopped; its exception has it as ``partial_training``.

    Args:
        summary: what was done until then.
        adapter: the directory that it was saved in, or None.
        weights: the adapter, {canonical name: fp32 tensor}, where there is no directory; else None.
            `mezo.checkpoint.peft.save_peft` writes them.
        sentence: this in words.
    """

    summary: TrainSummary
    adapter: Path | None
    weights: dict[str, torch.Tensor] | None
    sentence: str


def train_and_save(
    trainer: MeZOTrainer,
    directory: str | Path | None,
    *,
    finish: Callable[[], None] | None = None,
    rebuild: Callable[[Path], Path] | None = None,
) -> TrainSummary:
    """Train and write the adapter; keep what was trained if anything comes in between.

    Args:
        trainer: has not begun.
        directory: where to, or None to save nothing.
        finish: called between training and saving.
        rebuild: writes the adapter without the engine, where that no longer gives the weights.

    Returns:
        The summary.

    Raises:
        BaseException: whatever stopped the training or the saving. If a step was taken it has
            `PartialTraining` as ``partial_training``, and its sentence as a note (Python 3.11).
            The adapter is then in ``directory``, or in a temporary directory where that cannot be
            written; without ``directory`` its weights are in the exception.
    """
    try:
        summary = trainer.run_loop()
        if finish is not None:
            finish()
        if directory is not None:
            trainer.run.save(directory)
    except BaseException as error:
        if trainer.summary.steps:
            _attach(error, _keep(trainer, directory, error, rebuild))
        raise
    return summary


def partial_training_of(error: BaseException) -> PartialTraining | None:
    """Return what an exception says was kept, or one that it came on top of (a second Ctrl-C)."""
    cause: BaseException | None = error
    while cause is not None:
        partial = getattr(cause, "partial_training", None)
        if isinstance(partial, PartialTraining):
            return partial
        cause = cause.__context__
    return None


def _keep(
    trainer: MeZOTrainer,
    directory: str | Path | None,
    error: BaseException,
    rebuild: Callable[[Path], Path] | None,
) -> PartialTraining:
    """Save what was trained, or copy it from the engine."""
    run = trainer.run
    adapter: Path | None = None
    weights: dict[str, torch.Tensor] | None = None
    place = "lost, because the engine no longer gives them"
    try:
        if directory is not None:
            adapter, place = _save_somewhere(run, Path(directory))
        else:
            weights = run.weights()
            place = "not saved, because there is no output, and are error.partial_training.weights"
    except Exception as second:
        with suppress(Exception):
            weights = run.weights()
            place = f"in error.partial_training.weights, as saving failed ({_words(second)})"
        if weights is None and directory is not None and rebuild is not None:
            with suppress(Exception):
                adapter = rebuild(Path(directory))
                place = f"in {adapter}, replayed, as the engine no longer gives them"
        if weights is None and adapter is None:
            place += f" ({_words(second)})"
    summary = trainer.summary  # after saving, by which a run learns whether its last step was taken
    return PartialTraining(
        summary,
        adapter,
        weights,
        f"training stopped after {summary.steps} of {summary.num_steps} steps "
        f"({_words(error)}); their weights are {place}.",
    )


def _save_somewhere(run: Run, directory: Path) -> tuple[Path, str]:
    """Write the adapter, to a temporary directory where ``directory`` fails; says where it is."""
    try:
        return run.save(directory), f"in {directory}"
    except Exception as error:
        fallback = Path(tempfile.mkdtemp(prefix=f"mezo-{run.name}-"))
        try:
            run.save(fallback)
        except Exception:
            with suppress(OSError):
                fallback.rmdir()
            raise error from None
        return fallback, f"in {fallback}, as {directory} failed ({_words(error)})"


def _attach(error: BaseException, partial: PartialTraining) -> None:
    """Let an exception say what was kept; the exception itself stays what it is."""
    with suppress(Exception):  # a class may forbid attributes
        error.partial_training = partial  # type: ignore[attr-defined]
    if hasattr(error, "add_note"):
        error.add_note(partial.sentence)


def _words(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
