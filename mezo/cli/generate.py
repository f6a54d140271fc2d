"""`mezo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezo.cli._calls import ENGINE, MODEL, THREADS, given, said_as_exit_codes
from mezo.train.saved_run import chosen, open_run, read_prompts, worded


def generate(
    run: Annotated[Path, typer.Argument(help="Output directory of a training.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, without the invocation; may be repeated.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Text file with a prompt on each line.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max_new_tokens", "--max-new-tokens", help="The most new tokens; default 64."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 (the default) takes the likeliest token; above, tokens are drawn."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text at which to end; may be repeated.")
    ] = None,
    base: Annotated[bool | None, typer.Option("--base", help="Use the base model only.")] = None,
    engine: ENGINE = None,
    model: MODEL = None,
    threads: THREADS = None,
) -> None:
    """Continue prompts with a trained adapter; one trained to choose says what it chooses.

    Prompts are worded as the training's rows, a chat's as the user's message; the invocation is put
    between each prompt and its answer. One prompt: its answer is printed. Several: each prompt
    behind "> ", then its answer. The answer of an adapter that was trained on options is these with
    their probabilities; max_new_tokens, temperature or stop ask for a continuation instead.
    """
    with said_as_exit_codes():
        prompts = [*(prompt or []), *(read_prompts(file) if file else [])]
        if not prompts:
            raise ValueError("generate: there must be a prompt, got none; give --prompt or --file.")
        with open_run(run, engine=engine, model=model, threads=threads) as opened:
            options = given(
                max_new_tokens=max_new_tokens, temperature=temperature, stop=stop, base=base
            )
            choices = None if options.keys() - {"base"} else chosen(run, opened, prompts, **options)
            if choices is None:
                answers = opened.generate(worded(run, opened, prompts), **options)
            else:
                answers = [_shares(choice) for choice in choices]
    for text, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            typer.echo(f"> {text}")
        typer.echo(answer)


def _shares(choice: dict[str, float]) -> str:
    """Options and their probabilities in a line."""
    return "  ".join(f"{option.strip()} {share:.3f}" for option, share in choice.items())
