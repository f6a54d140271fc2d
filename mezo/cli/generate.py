"""`mezo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezo.cli._errors import said_as_exit_codes
from mezo.engines.sampling import MAX_NEW_TOKENS, TEMPERATURE
from mezo.train.saved_run import open_run, read_prompts


def generate(
    run: Annotated[Path, typer.Argument(help="Output directory of a training.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, without the invocation; may be repeated.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Text file with a prompt on each line.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", help="The most new tokens.")
    ] = MAX_NEW_TOKENS,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")
    ] = TEMPERATURE,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text at which to end; may be repeated.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Use the base model only.")] = False,
    engine: Annotated[
        str | None, typer.Option(help="sglang or transformers; default that of the training.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "--model_name_or_path", help="Base model; default that of the training."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU hosts: threads of the engine; default OMP_NUM_THREADS.")
    ] = None,
) -> None:
    """Continue prompts with a trained adapter.

    The training's invocation is put between each prompt and its answer. One prompt: its answer is
    printed. Several: each prompt behind "> ", then its answer.
    """
    with said_as_exit_codes():
        prompts = [*(prompt or []), *(read_prompts(file) if file else [])]
        if not prompts:
            raise ValueError("generate: there must be a prompt, got none; give --prompt or --file.")
        with open_run(run, engine=engine, model=model, threads=threads) as opened:
            answers = opened.generate(
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop=stop or (),
                base=base,
            )
    for text, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            typer.echo(f"> {text}")
        typer.echo(answer)
