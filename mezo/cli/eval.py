"""`mezo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezo.cli._calls import ENGINE, MODEL, THREADS, said_as_exit_codes
from mezo.train.evaluation import evaluate_run, table_of
from mezo.train.metrics import METRICS


def evaluate(
    run: Annotated[Path, typer.Argument(help="Output directory of a training.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "--dataset_name", help="Examples; default the training's held-out ones."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split; default the training's test.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METRICS)}; default as trained."),
    ] = None,
    max_examples: Annotated[
        int | None, typer.Option("--max_eval_samples", "--max-examples", help="Default all.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", "--max-new-tokens", help="Of generated texts.")
    ] = None,
    engine: ENGINE = None,
    model: MODEL = None,
    threads: THREADS = None,
) -> None:
    """Score a trained adapter beside its base model: loss, accuracy, F1, exact match, perplexity.

    Also writes eval_results.json into the run's directory.
    """
    with said_as_exit_codes():
        result = evaluate_run(
            run,
            data,
            split=split,
            metric=metric,
            max_examples=max_examples,
            max_new_tokens=max_new_tokens,
            engine=engine,
            model=model,
            threads=threads,
        )
    typer.echo(table_of(result))
