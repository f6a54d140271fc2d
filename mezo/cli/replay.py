"""`mezo replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezo.checkpoint.replayed import write_adapter
from mezo.checkpoint.run_directory import trajectory_of
from mezo.cli._calls import said_as_exit_codes

RUN = typer.Argument(help="Output directory of a training, or its trajectory.mezo.")
AT = typer.Option(help="How many steps; default all of them.")
BACKEND = typer.Option(help="cpu, triton, cuda or reference; default the best one here.")
OUTPUT = typer.Option("--output", "--output_dir", help="Where to; default RUN/replayed-STEP.")


def replay(
    run: Annotated[Path, RUN],
    at: Annotated[int | None, AT] = None,
    backend: Annotated[str | None, BACKEND] = None,
    output: Annotated[Path | None, OUTPUT] = None,
) -> None:
    """Write the adapter that a training had behind any step, without its model or an engine.

    For example: mezo replay runs/mine --at 400
    """
    with said_as_exit_codes():
        trajectory = trajectory_of(run)
        step = len(trajectory.records) if at is None else at
        folder = run if run.is_dir() else run.parent
        target = output or folder / f"replayed-{step}"
        with typer.progressbar(length=step, label="replay") as bar:
            write_adapter(
                trajectory,
                target,
                at,
                backend=backend,
                progress=lambda done, of: bar.update(done - bar.pos),
            )
    typer.echo(f"Wrote {target}, the adapter behind {step} steps.")
