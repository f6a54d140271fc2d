"""`finetune`: attach, train, save and detach in one call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mezo._arguments import checked_config, checked_path
from mezo._closing import closing
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
    engine: Any,
    batches: Iterable[Batch | EncodedBatch],
    *,
    num_steps: int,
    config: MeZOConfig | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    schedule: str = TrainConfig.schedule,
    held_out: Sequence[Batch | EncodedBatch] = (),
    eval_every: int | None = TrainConfig.eval_every,
    callbacks: Sequence[Callback] = (),
) -> TrainSummary:
    """Attach a fresh adapter, train it, save it as a PEFT adapter and detach it.

    Args:
        engine: as in `mezo.attach`, or the path of a model: then an SGLang engine is started for
            the time of the call.
        batches: the training batches, one per step.
        num_steps: steps to take.
        config: the adapter and the estimator.
        tokenizer: see `mezo.attach`.
        output: directory for the adapter, or None to save nothing.
        schedule: see `MeZOTrainer`, like the following ones.
        held_out: batches to evaluate on.
        eval_every: steps between evaluations.
        callbacks: called after each step and evaluation.

    Returns:
        The summary; look at its ``problems``.

    Raises:
        ValueError: ``output`` cannot be written to, or what `mezo.attach` and `MeZOTrainer` refuse;
            no step has been taken then.
        BaseException: whatever stopped the training, Ctrl-C included. The adapter with the steps
            taken until then is saved (a log line says where), or kept in
            ``error.partial_training.weights`` if there is no ``output``.
    """
    config = checked_config("finetune", config)
    check_loop(batches, num_steps, schedule, eval_every, held_out, callbacks)
    if output is not None:
        check_output(checked_path("finetune: output", output), ADAPTER_FILES)
    if isinstance(engine, (str, Path)):
        with ENGINES["sglang"].launch(str(engine), config) as started:
            return finetune(
                started,
                batches,
                num_steps=num_steps,
                config=config,
                tokenizer=tokenizer,
                output=output,
                schedule=schedule,
                held_out=held_out,
                eval_every=eval_every,
                callbacks=callbacks,
            )
    run = attach(engine, config, tokenizer=tokenizer)
    with closing(run.close):
        trainer = MeZOTrainer(
            run,
            batches,
            num_steps=num_steps,
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
