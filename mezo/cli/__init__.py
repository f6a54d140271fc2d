"""The command line: arguments -> settings -> `mezo.train.task`; what is usable here."""

from __future__ import annotations

import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

import mezo
import mezo_kernels
from mezo import tasks
from mezo.config import MezoConfig
from mezo.diagnostics.doctor import diagnose
from mezo.engines import EngineError, available
from mezo.tasks.assets import AssetError
from mezo.train.saving import PartialTraining, partial_training_of
from mezo.train.task import TaskSettings, train_task

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train LoRA adapters with forward passes only (MeZO), inside the engine that serves them.",
)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Directory for adapter, summary, log and plot.")],
    task: Annotated[str, typer.Option(help="Task to train on.")] = "rotten_tomatoes",
    engine: Annotated[str, typer.Option(help="sglang or transformers.")] = "sglang",
    model: Annotated[str | None, typer.Option(help="Model; default SmolLM2-135M-Instruct.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data file; default the task's own.")] = None,
    steps: Annotated[int, typer.Option(help="Steps to take.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of the first step.")] = 3e-3,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "linear",
    eps: Annotated[float, typer.Option(help="Perturbation scale.")] = 1e-3,
    clip: Annotated[float | None, typer.Option(help="Bound on abs(projected_grad).")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the directions and of the data order.")] = 0,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 16.0,
    target_modules: Annotated[
        str, typer.Option(help="Comma-separated module names.")
    ] = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    num_directions: Annotated[int, typer.Option(help="Directions a step.")] = 1,
    prefix: Annotated[
        str, typer.Option(help="exact, activated or detached (approximate).")
    ] = "exact",
    train_examples: Annotated[
        int | None, typer.Option(help="Training examples; default all of them.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Leave out training examples with longer prompts.")
    ] = None,
    eval_examples: Annotated[int, typer.Option(help="Held-out examples.")] = 200,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations; default before and after only.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU hosts: engine threads; default OMP_NUM_THREADS, else 1.")
    ] = None,
) -> None:
    """Train an adapter on a task, and evaluate it before and after."""
    try:
        config = MezoConfig(
            rank=rank,
            alpha=alpha,
            target_modules=tuple(name.strip() for name in target_modules.split(",")),
            lr=lr,
            eps=eps,
            clip=clip,
            seed=seed,
            num_directions=num_directions,
            prefix=prefix,
            invocation=tasks.get(task).invocation,
            name=task,
        )
        settings = TaskSettings(
            task=task,
            output=output,
            config=config,
            engine=engine,
            model=model,
            data=data,
            num_steps=steps,
            batch_size=batch_size,
            schedule=schedule,
            train_examples=train_examples,
            max_prompt_tokens=max_prompt_tokens,
            eval_examples=eval_examples,
            eval_every=eval_every,
            threads=threads,
        )
    except (ValueError, NotImplementedError, ImportError, AssetError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    _run(settings)


def _run(settings: TaskSettings) -> None:
    """Train; ends the process with 0, or 1 (problems), 2 (arguments), 130 or 143 (signals)."""
    terminated: list[int] = []
    try:
        with _sigterm_interrupts(terminated):
            record = train_task(settings)
    except BaseException as error:
        partial = partial_training_of(error)
        code = _exit_code(error, has_trained=partial is not None)
        if code is not None or partial is not None:
            _say(error, partial)
        if code is None:
            raise
        raise typer.Exit(143 if terminated and code == 130 else code) from error
    if record["problems"]:
        raise typer.Exit(1)


def _exit_code(error: BaseException, *, has_trained: bool) -> int | None:
    """The exit status for what stopped a training; None where a traceback is of use."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, (ValueError, NotImplementedError, ImportError, AssetError, EngineError)):
        return 1 if has_trained else 2
    return 1 if has_trained and isinstance(error, (RuntimeError, OSError)) else None


def _say(error: BaseException, partial: PartialTraining | None) -> None:
    """One sentence on what stopped a training and where its weights are."""
    is_signal = isinstance(error, KeyboardInterrupt)
    sentence = "nothing was saved." if is_signal else str(error)
    if partial is not None:
        sentence = partial.sentence
    typer.echo(f"{'interrupted' if is_signal else 'error'}: {sentence}", err=True)


@contextmanager
def _sigterm_interrupts(arrived: list[int]) -> Iterator[None]:
    """Let SIGTERM (a batch system's, `docker stop`) end a training as Ctrl-C does: saved."""

    def interrupt(signum: int, frame: object) -> None:
        arrived.append(signum)
        if not callable(signal.getsignal(signal.SIGINT)):  # ignored: started in the background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)  # where Ctrl-C is put off, so is this

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Start an engine with this model and check it.")
    ] = None,
    engine: Annotated[str, typer.Option(help="With --model: sglang or transformers.")] = "sglang",
    target_modules: Annotated[
        str | None, typer.Option(help="With --model: comma-separated; default the usual ones.")
    ] = None,
) -> None:
    """Say what is installed, which engines and kernel backends are usable here, and why not.

    With --model: start an engine, run the self-test, compare a batch with transformers; exit code
    1 if a check fails, 2 if it cannot be started.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    typer.echo(f"mezo-sglang {mezo.__version__}, Python {platform.python_version()}")
    typer.echo(f"torch {torch.__version__}, GPU {gpu}")
    for title, table in (("engine", available()), ("backend", mezo_kernels.backends())):
        for name, reason in table.items():
            typer.echo(f"{title} {name}: {'usable' if reason is None else reason}")
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


if __name__ == "__main__":
    sys.exit(app())
