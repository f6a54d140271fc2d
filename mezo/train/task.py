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
from mezo.config import MeZOConfig, TrainConfig
from mezo.data.example import Example, batch_of
from mezo.data.sampling import batches
from mezo.engines import ENGINES
from mezo.run import Run, attach
from mezo.tasks import assets
from mezo.train.saving import train_and_save
from mezo.train.task_files import TaskLog, can_plot, closing_words, leave_files, record_of
from mezo.train.trainer import MeZOTrainer

_EVAL_BATCH = 50


def settings_of(**given: Any) -> tuple[TrainConfig, MeZOConfig]:
    """Return the settings of a training: what is given, else the task's preset, else the default.

    Args:
        given: fields of `TrainConfig` and `MeZOConfig`; `output` is needed. Modules may be given as
            one text with commas.

    Raises:
        ValueError: an unknown task or field, or what the two classes refuse.
    """
    task = tasks.TASKS.check(given.get("task", TrainConfig.task), "train: ")
    values: dict[str, Any] = {
        "name": task,
        "invocation": tasks.get(task).invocation,
        **tasks.get(task).preset,
    }
    values |= given
    if isinstance(modules := values.get("target_modules"), str):
        values["target_modules"] = tuple(name.strip() for name in modules.split(","))
    loop = {f.name for f in dataclasses.fields(TrainConfig)}
    known = sorted(loop | {f.name for f in dataclasses.fields(MeZOConfig)})
    unknown = sorted(set(values) - set(known))
    require(
        not unknown,
        f"train: settings and the preset of task {task!r} must be fields of TrainConfig and "
        f"MeZOConfig, got {unknown}; use {known}.",
    )
    settings = TrainConfig(**{name: values[name] for name in values if name in loop})
    ENGINES.check(settings.engine, "train: ")
    return settings, MeZOConfig(**{name: values[name] for name in values if name not in loop})


def train_task(settings: TrainConfig, config: MeZOConfig) -> dict[str, Any]:
    """Train, evaluate before and after, save the adapter, the log, the plot and the summary.

    The adapter is written first. Whatever ends the training, Ctrl-C included, it is
    written with the steps taken until then. Nothing that fails afterwards removes it.

    Args:
        settings: the training.
        config: the adapter and the estimator, with the task's invocation.

    Returns:
        The content of summary.json; look at its "problems".

    Raises:
        ValueError: an unknown task or engine, output cannot be written to, no training example is
            short enough, or one is too long for the engine.
        AssetError: the model or the data cannot be fetched.
        ImportError: the engine is not installed.
        BaseException: whatever stopped the training; if a step was taken, the files are there and
            the exception has a `PartialTraining` as ``partial_training``.
    """
    task, engine = tasks.get(settings.task), ENGINES[settings.engine]
    check_output(settings.output, ("summary.json", "steps.jsonl", "loss.png"))
    check_output(settings.output / "adapter", ADAPTER_FILES)
    has_plots = can_plot()
    model = settings.model or str(assets.model_dir())
    splits = task.load(settings.data)
    print(f"Starting the {settings.engine} engine with {Path(model).name} ...", flush=True)
    with engine.launch(model, config, threads=settings.threads) as handle:
        run = attach(handle, config, tokenizer=engine.tokenizer(model))
        with closing(run.close):
            train = _short_enough(splits.train, run, settings.max_prompt_tokens)[
                : settings.train_examples
            ]
            require(
                len(train) >= settings.batch_size,
                f"train: there must be a batch of {settings.batch_size} training examples, got "
                f"{len(train)}; raise train_examples or max_prompt_tokens.",
            )
            _check_rows(train, run)
            held_out = splits.test[: settings.eval_examples]
            log = TaskLog(settings, config, model, can_plot=has_plots)
            trainer = MeZOTrainer(
                run,
                map(batch_of, batches(train, settings.batch_size, config.seed)),
                num_steps=settings.num_steps,
                schedule=settings.schedule,
                held_out=[
                    batch_of(held_out[i : i + _EVAL_BATCH])
                    for i in range(0, len(held_out), _EVAL_BATCH)
                ],
                eval_every=settings.eval_every,
                callbacks=[log],
            )
            record = _train(settings, trainer, log, num_train=len(train), model=model)
    print(closing_words(record, settings.output, has_plot=log.has_plot))
    return record


def _train(
    settings: TrainConfig,
    trainer: MeZOTrainer,
    log: TaskLog,
    *,
    num_train: int,
    model: str,
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


def _short_enough(examples: Sequence[Example], run: Run, limit: int | None) -> list[Example]:
    """The examples whose prompts have at most ``limit`` tokens."""
    if limit is None:
        return list(examples)
    tokenizer = run.session.tokenizer
    lengths = [len(ids) for ids in tokenizer([str(e.prompt) for e in examples])["input_ids"]]
    return [e for e, n in zip(examples, lengths, strict=True) if n <= limit]


def _check_rows(examples: Sequence[Example], run: Run) -> None:
    """Raise for an example whose rows are too long for the engine, before a step fails."""
    for example in examples:
        # A token has at least one byte, or an eighth where the tokenizer unfolds characters.
        if 8 * len(str(example.prompt).encode()) + 256 > run.session.max_row_tokens:
            try:
                run.encode(batch_of([example]))
            except ValueError as error:
                raise ValueError(
                    f"train: every training example must fit the engine, got {error} The text "
                    f"begins {str(example.prompt)[:40]!r}; set max_prompt_tokens."
                ) from error
