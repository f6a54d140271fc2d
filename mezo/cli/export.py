"""`mezo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezo.checkpoint.export import export_run
from mezo.cli._calls import MODEL, given, said_as_exit_codes


def export(
    run: Annotated[
        Path, typer.Argument(help="Output directory of a training, or a PEFT adapter's directory.")
    ],
    output: Annotated[
        Path, typer.Option(help="Directory to write; for gguf-lora also a file NAME.gguf.")
    ],
    format: Annotated[
        str | None, typer.Option(help="peft (the default), merged or gguf-lora.")
    ] = None,
    model: MODEL = None,
) -> None:
    """Write a trained adapter for other programs.

    peft: a checked copy. merged: the base model with the adapter in its weights, which any program
    loads as a model of its own. gguf-lora: an adapter file for llama.cpp (llama-server --lora).
    The last two are not for activated adapters.
    """
    with said_as_exit_codes():
        path = export_run(run, output=output, **given(format=format, model=model))
    typer.echo(f"Wrote {path}.")
