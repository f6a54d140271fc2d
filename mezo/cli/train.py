"""`mezo train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from mezo._signals import sigterm_interrupts
from mezo.cli.options import with_options
from mezo.config import MeZOConfig, TrainConfig
from mezo.engines import EngineError
from mezo.settings import merged, read_assignments, read_yaml, settings_of
from mezo.tasks.assets import AssetError
from mezo.train import training
from mezo.train.saving import PartialTraining, partial_training_of
from mezo.train.upload import UploadError

CONFIG = typer.Option("--config", help="YAML file with settings; the command line wins.")
SET = typer.Option("--set", help="A setting as name=value; wins over all; may be repeated.")


@with_options(TrainConfig, MeZOConfig)
def train(
    config: Annotated[Path | None, CONFIG] = None,
    set_: Annotated[list[str] | None, SET] = None,
    **options: Any,
) -> None:
    """Train an adapter on your own data or on a task, and evaluate it before and after.

    For example: mezo train --data reviews.csv --output_dir runs/mine
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        file = {} if config is None else read_yaml(config)
        settings, run = settings_of(**merged(file, given, read_assignments(set_ or ())))
    except (ValueError, NotImplementedError, ImportError, AssetError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    _run(settings, run)


def _run(settings: TrainConfig, config: MeZOConfig) -> None:
    """Train; ends the process with 0, or 1 (problems), 2 (arguments), 130 or 143 (signals)."""
    terminated: list[int] = []
    try:
        with sigterm_interrupts(terminated):
            _, record = training.train(settings, config)
    except BaseException as error:
        partial = partial_training_of(error)
        code = _exit_code(error, has_trained=partial is not None)
        if code is not None or partial is not None:
            _say(error, partial)
            if partial is not None:
                output = shlex.quote(str(settings.output))
                typer.echo(f"go on with: mezo train --resume_from_checkpoint {output}", err=True)
        if code is None:
            raise
        raise typer.Exit(143 if terminated and code == 130 else code) from error
    if record["problems"]:
        raise typer.Exit(1)


def _exit_code(error: BaseException, *, has_trained: bool) -> int | None:
    """The exit status for what stopped a training; None where a traceback is of use."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, (ValueError, NotImplementedError, ImportError, AssetError, EngineError)):
        return 1 if has_trained else 2
    if isinstance(error, UploadError):
        return 1
    return 1 if has_trained and isinstance(error, (RuntimeError, OSError)) else None


def _say(error: BaseException, partial: PartialTraining | None) -> None:
    """One sentence on what stopped a training and where its weights are."""
    is_signal = isinstance(error, KeyboardInterrupt)
    sentence = "nothing was saved." if is_signal else str(error)
    if partial is not None:
        sentence = partial.sentence
    typer.echo(f"{'interrupted' if is_signal else 'error'}: {sentence}", err=True)
