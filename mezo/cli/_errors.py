"""What a verb says, and which exit code it gives, when a call of it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def said_as_exit_codes() -> Iterator[None]:
    """End with 2 for what the user can change in the command, with 1 for what failed otherwise.

    Exceptions of other kinds are mistakes in our code, and go on with their traceback.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, RuntimeError) as error:  # `EngineError` is one
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
