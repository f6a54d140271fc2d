"""What verbs share: options, which of them were given, and what is said when a call fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

ENGINE = Annotated[
    str | None, typer.Option(help="sglang or transformers; default that of the training.")
]
MODEL = Annotated[
    str | None,
    typer.Option(
        "--model", "--model_name_or_path", help="Base model; default that of the training."
    ),
]
THREADS = Annotated[
    int | None, typer.Option(help="CPU hosts: threads of the engine; default OMP_NUM_THREADS.")
]


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


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; the defaults of others stand in the function called."""
    return {name: value for name, value in options.items() if value is not None}
