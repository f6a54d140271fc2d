"""Train an adapter on a task, evaluate it, save it, plot it: what `mezo train` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezo import tasks
from mezo._closing import closing
from mezo._inputs import require
from mezo.checkpoint.atomic import check_output
from mezo.checkpoint.peft import ADAPTER_FILES
from mezo.config import MezoConfig
from mezo.data.sampling import batches
from mezo.engines import ENGINES
from mezo.run import Run, attach
from mezo.tasks import Example, Task, assets
from mezo.train.saving import train_and_save
from mezo.train.task_files import TaskLog, can_plot, closing_words, leave_files, record_of
from mezo.train.trainer import MeZOTrainer

_EVAL_BATCH = 50


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """A training run on a task.

    Args:
        task: name of the task (see `mezo.tasks`).
        output: directory for adapter/, summary.json, steps.jsonl and loss.png.
        config: the adapter and the estimator.
        engine: "sglang" or "transformers".
        model: directory or name of the model; None takes SmolLM2-135M-Instruct from the cache.
        data: file with the task's data; None takes the cache's.
        num_steps: steps to take.
        batch_size: examples a step.
        schedule: learning rate: "constant", "linear" or "cosine".
        train_examples: examples to train on, the first of the split; None takes all. With prefix
            "activated" a set whose prompts fit into the engine's cache is computed only once.
        max_prompt_tokens: training examples with longer prompts are left out; None keeps all.
        eval_examples: held-out examples (of any length) to evaluate on.
        eval_every: steps between evaluations, or None for before and after only.
        threads: CPU hosts: threads of the engine; None: see `launch_engine`.

    Raises:
        ValueError: an unknown task or engine, or a number below 1.
    """

    task: str
    output: Path
    config: MezoConfig
    engine: str = "sglang"
    model: str | None = None
    data: Path | None = None
    num_steps: int = 400
    batch_size: int = 16
    schedule: str = "linear"
    train_examples: int | None = None
    max_prompt_tokens: int | None = None
    eval_examples: int = 200
    eval_every: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        tasks.get(self.task)
        ENGINES.check(self.engine, "train: ")
        for name in ("num_steps", "batch_size", "train_examples", "eval_examples", "threads"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"train: {name} must be at least 1, got {value}; raise it.",
            )


def train_task(settings: TaskSettings) -> dict[str, Any]:
    """Train, evaluate before and after, save the adapter, the log, the plot and the summary.

    The adapter is written first, and whatever ends the training, Ctrl-C included: then with the
    steps taken until then. Nothing that fails afterwards takes it away.

    Args:
        settings: what to do.

    Returns:
        The content of summary.json; look at its "problems".

    Raises:
        ValueError: output cannot be written to, no training example is short enough, or one is too
            long for the engine.
        AssetError: the model or the data cannot be fetched.
        ImportError: the engine is not installed.
        BaseException: whatever stopped the training; if a step was taken, the files are there and
            the exception has a `PartialTraining` as ``partial_training``.
    """
    task = tasks.get(settings.task)
    check_output(settings.output, ("summary.json", "steps.jsonl", "loss.png"))
    check_output(settings.output / "adapter", ADAPTER_FILES)
    has_plots = can_plot()
    model = settings.model or str(assets.model_dir())
    splits = task.load(settings.data)
    print(f"Starting the {settings.engine} engine with {Path(model).name} ...", flush=True)
    engine = ENGINES[settings.engine]
    with engine.launch(model, settings.config, threads=settings.threads) as handle:
        run = attach(handle, settings.config, tokenizer=engine.tokenizer(model))
        with closing(run.close):
            train = _short_enough(splits.train, task, run, settings.max_prompt_tokens)[
                : settings.train_examples
            ]
            require(
                len(train) >= settings.batch_size,
                f"train: there must be a batch of {settings.batch_size} training examples, got "
                f"{len(train)}; raise train_examples or max_prompt_tokens.",
            )
            _check_rows(train, task, run)
            held_out = splits.test[: settings.eval_examples]
            log = TaskLog(settings, task, model, can_plot=has_plots)
            trainer = MeZOTrainer(
                run,
                map(task.batch, batches(train, settings.batch_size, settings.config.seed)),
                num_steps=settings.num_steps,
                schedule=settings.schedule,
                held_out=[
                    task.batch(held_out[i : i + _EVAL_BATCH])
                    for i in range(0, len(held_out), _EVAL_BATCH)
                ],
                eval_every=settings.eval_every,
                callbacks=[log],
            )
            record = _train(settings, trainer, log, num_train=len(train), model=model)
    print(closing_words(record, settings.output, has_plot=log.has_plot))
    return record


def _train(
    settings: TaskSettings, trainer: MeZOTrainer, log: TaskLog, *, num_train: int, model: str
) -> dict[str, Any]:
    """Train and leave the files, whatever happens; the adapter comes first."""

    def leave() -> dict[str, Any]:
        record = record_of(settings, trainer, log, num_train=num_train, model=model)
        leave_files(settings.output, record, log)
        return record

    try:
        with log:
            train_and_save(trainer, settings.output / "adapter")
    except BaseException:
        if trainer.summary.steps:
            leave()
        raise
    return leave()


def _short_enough(
    examples: Sequence[Example], task: Task, run: Run, limit: int | None
) -> list[Example]:
    """The examples whose prompts have at most ``limit`` tokens."""
    if limit is None:
        return list(examples)
    tokenizer = run.session.tokenizer
    lengths = [len(ids) for ids in tokenizer([task.prompt(e.text) for e in examples])["input_ids"]]
    return [e for e, n in zip(examples, lengths, strict=True) if n <= limit]


def _check_rows(examples: Sequence[Example], task: Task, run: Run) -> None:
    """Raise for an example whose rows the engine does not take, before a step is lost to it."""
    for example in examples:
        # A token has at least one byte, or an eighth where the tokenizer unfolds characters.
        if 8 * len(task.prompt(example.text).encode()) + 256 > run.session.max_row_tokens:
            try:
                run.encode(task.batch([example]))
            except ValueError as error:
                raise ValueError(
                    f"train: every training example must fit the engine, got {error} The text "
                    f"begins {example.text[:40]!r}; set max_prompt_tokens."
                ) from error
