"""`mezo doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from mezo.config import TrainConfig
from mezo.diagnostics.doctor import diagnose, inventory
from mezo.engines import EngineError


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Start an engine with this model and check it.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="With --model: sglang or transformers.")
    ] = TrainConfig.engine,
    target_modules: Annotated[
        str | None, typer.Option(help="With --model: comma-separated; default the usual ones.")
    ] = None,
) -> None:
    """Say what is installed, which engines and kernel backends are usable here, and why not.

    With --model: start an engine, run the self-test, compare a batch with transformers; exit code
    1 if a check fails, 2 if it cannot be started.
    """
    for line in inventory():
        typer.echo(line)
    if model is None:
        return
    try:
        names = [n.strip() for n in target_modules.split(",")] if target_modules else None
        is_well = diagnose(model, engine=engine, target_modules=names, echo=typer.echo)
    except (ValueError, OSError, ImportError, NotImplementedError, EngineError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo("all checks hold" if is_well else "a check failed")
    raise typer.Exit(0 if is_well else 1)
