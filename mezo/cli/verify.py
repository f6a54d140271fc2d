"""`mezo verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezo.checkpoint.verify import verify as verified
from mezo.cli._calls import said_as_exit_codes

RUN = typer.Argument(help="Output directory of a training.")
MODEL = typer.Option(
    "--model", "--model_name_or_path", help="Compare this model; default the training's own."
)


def verify(
    run: Annotated[Path, RUN],
    model: Annotated[str | None, MODEL] = None,
) -> None:
    """Check that a training's files are whole and that its adapters are the replayed ones.

    For example: mezo verify runs/mine
    """
    with said_as_exit_codes():
        checks = verified(run, model=model)
    for check in checks:
        typer.echo(f"{'ok  ' if check.is_ok else 'BAD '} {check.name}: {check.detail}")
    if not all(check.is_ok for check in checks):
        raise typer.Exit(1)
