"""`finetune`: everything that `mezo train` does, in one call; or attach, train, save and detach."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from mezo._arguments import checked_config, checked_path
from mezo._closing import closing
from mezo._inputs import require, shown
from mezo.checkpoint.atomic import check_output
from mezo.checkpoint.peft import ADAPTER_FILES
from mezo.config import MeZOConfig, TrainConfig
from mezo.data.batch import Batch, EncodedBatch
from mezo.engines import ENGINES
from mezo.run import attach
from mezo.train.callbacks import Callback
from mezo.train.saving import partial_training_of, train_and_save
from mezo.train.summary import TrainSummary
from mezo.train.trainer import MeZOTrainer, check_loop

logger = logging.getLogger(__name__)


def finetune(
    model: Any,
    data: Any,
    *,
    config: MeZOConfig | None = None,
    tokenizer: Any = None,
    callbacks: Sequence[Callback | Any] = (),
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    **options: Any,
) -> TrainSummary:
    """Fine-tune a model on data: what `mezo train` does, with the same options, in one call.

    Args:
        model: directory or hub name of a model, for which an engine is started for the time of the
            call; or what `mezo.attach` takes: an ``sglang.Engine`` or a Hugging Face model.
        data: a file, a folder or a hub name; a `datasets.Dataset` or ``DatasetDict``; a
            ``pandas.DataFrame``; a list of dicts, or another iterable, which is read whole; or an
            iterable of `mezo.Batch`, one per step. The option ``eval_data`` takes the same but
            batches.
        config: the adapter and the estimator, in place of single options for them.
        tokenizer: the model's; None: loaded by the model's name.
        callbacks: functions of a `mezo.train.callbacks.Progress`, or objects of
            `transformers.TrainerCallback`.
        compute_metrics: as in `transformers.Trainer`, see `mezo.train.training.train`.
        options: settings of `MeZOConfig` and `TrainConfig`, by their names there or by Hugging
            Face's: ``output_dir`` (needed, but for batches), ``learning_rate``, ``max_steps``, ...
            For batches: ``num_steps`` (needed), ``output``, ``schedule``, ``held_out`` (batches),
            ``eval_every``.

    Returns:
        The summary; look at its ``problems``.

    Raises:
        ValueError: a bad option, bad data, or an output that cannot be written to; no step has been
            taken then.
        BaseException: whatever stopped the training, Ctrl-C included. The adapter with the steps
            taken until then is saved (a log line says where), or kept in
            ``error.partial_training.weights`` if there is no output.

    Example:
        >>> mezo.finetune("path/to/model", "reviews.csv", output_dir="runs/mine", max_steps=200)
    """
    data = rows_of(data)
    if not is_data(data):
        require(
            compute_metrics is None,
            "finetune: compute_metrics must come with rows of data, got batches; pass callbacks.",
        )
        return _on_batches(
            model, data, config=config, tokenizer=tokenizer, callbacks=callbacks, **options
        )
    # What words rows needs packages that steps on batches do without.
    from mezo.settings import settings_of
    from mezo.train import training
    from mezo.train.model_card import IN_MEMORY

    is_path = isinstance(model, (str, os.PathLike))
    places = {"data": os.fspath(data) if isinstance(data, (str, os.PathLike)) else IN_MEMORY}
    if name := os.fspath(model) if is_path else _name_of(model):
        places["model"] = name
    evaluated = rows_of(options.get("eval_data"))
    if is_in_memory := evaluated is not None and not isinstance(evaluated, (str, os.PathLike)):
        require(
            is_data(evaluated),
            f"finetune: eval_data must be a file, a folder, a data set, a DataFrame or dicts, got "
            f"{shown(evaluated)}; pass one of these.",
        )
        options["eval_data"] = IN_MEMORY
    settings, own = settings_of(**places, **options)
    if config is not None:
        own = _only_config(checked_config("finetune", config), options)
    try:
        summary, _ = training.train(
            settings,
            own,
            data=data,
            eval_data=evaluated if is_in_memory else None,
            engine=None if is_path else model,
            tokenizer=tokenizer,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
        )
    except BaseException as error:
        if partial := partial_training_of(error):
            logger.warning("finetune: %s", partial.sentence)
        raise
    return summary


def _name_of(handle: Any) -> str | None:
    """Where a model in memory or in an engine was loaded from; None where it does not say."""
    server = getattr(handle, "server_args", None)
    name = getattr(server, "model_path", None) or getattr(handle, "name_or_path", None)
    return str(name) if name else None


def rows_of(data: Any) -> Any:
    """Return data with the rows of a DataFrame or of an iterable of dicts as a list.

    Batches, which may be endless or drawn while training, stay an iterable.

    Raises:
        ValueError: a list without anything, or one of something else than dicts and batches.
    """
    if callable(getattr(data, "to_dict", None)) and hasattr(data, "columns"):
        return data.to_dict("records")
    if isinstance(data, (str, os.PathLike, Mapping)) or hasattr(data, "column_names"):
        return data
    # A torch DataLoader draws random numbers when it is begun.
    if isinstance(data, DataLoader) or not isinstance(data, Iterable):
        return data
    is_once = isinstance(data, Iterator)
    first = next(iter(data), None) if not isinstance(data, Sequence) or len(data) else None
    if not isinstance(first, Mapping):
        is_batch = isinstance(first, (Batch, EncodedBatch))
        require(
            is_batch or not isinstance(data, Sequence),
            "finetune: data must be rows as dicts, or batches, got "
            f"{shown(data)}; pass dicts as "
            "{'prompt': ..., 'completion': ...}, or mezo.Batch.",
        )
        return chain([first], data) if is_once and first is not None else data
    rows = [first, *data] if is_once else list(data)
    require(
        all(isinstance(row, Mapping) for row in rows),
        "finetune: data must be dicts throughout, got other rows between them; pass dicts only.",
    )
    return rows


def is_data(data: Any) -> bool:
    """Whether something, from `rows_of`, is data to be worded, not batches."""
    if isinstance(data, (str, os.PathLike, Mapping)) or hasattr(data, "column_names"):
        return True
    return isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], Mapping)


def _only_config(config: MeZOConfig, options: Mapping[str, Any]) -> MeZOConfig:
    """The caller's config, unless options say something about it, too."""
    from mezo.settings import fields

    both = [name for name in options if fields()[name][0] is MeZOConfig]
    require(
        not both,
        f"finetune: {', '.join(both)} must be given once, got config=MeZOConfig(...) beside; put "
        "them into the config.",
    )
    return config


def _on_batches(
    engine: Any,
    batches: Iterable[Batch | EncodedBatch],
    *,
    num_steps: int | None = None,
    config: MeZOConfig | None,
    tokenizer: Any,
    output: str | Path | None = None,
    schedule: str = TrainConfig.schedule,
    held_out: Sequence[Batch | EncodedBatch] = (),
    eval_every: int | None = TrainConfig.eval_every,
    callbacks: Sequence[Callback | Any] = (),
    **unknown: Any,
) -> TrainSummary:
    """Attach a fresh adapter, train it on batches, save it as a PEFT adapter and detach it."""
    require(
        not unknown,
        f"finetune: options with batches must be num_steps, output, schedule, held_out and "
        f"eval_every, got {sorted(unknown)}; pass rows of data, or use MeZOTrainer.",
    )
    require(
        num_steps is not None,
        f"finetune: num_steps must be given with batches, got none for {shown(batches)}.",
    )
    config = checked_config("finetune", config)
    check_loop(batches, num_steps, schedule, eval_every, held_out, callbacks)
    if output is not None:
        check_output(checked_path("finetune: output", output), ADAPTER_FILES)
    is_path = isinstance(engine, (str, Path))
    started = ENGINES["sglang"].launch(str(engine), config) if is_path else nullcontext(engine)
    with started as handle, closing((run := attach(handle, config, tokenizer=tokenizer)).close):
        trainer = MeZOTrainer(
            run,
            batches,
            num_steps=num_steps or 0,
            schedule=schedule,
            held_out=held_out,
            eval_every=eval_every,
            callbacks=callbacks,
        )
        try:
            return train_and_save(trainer, output)
        except BaseException as error:
            if partial := partial_training_of(error):
                logger.warning("finetune: %s", partial.sentence)
            raise
