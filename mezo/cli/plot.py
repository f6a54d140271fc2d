"""`mezo plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezo.cli._calls import given, said_as_exit_codes
from mezo.train.run_plots import plot_runs


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Output directories of trainings.")],
    output: Annotated[
        Path | None, typer.Option(help="PNG file to write; default plot.png.")
    ] = None,
) -> None:
    """Draw loss, held-out accuracy, |projected_grad| and signal-to-noise of one or several runs."""
    with said_as_exit_codes():
        path = plot_runs(runs, **given(path=output))
    typer.echo(f"Wrote {path}.")
