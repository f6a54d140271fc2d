"""The training loop around `mezo.step`: schedule, evaluation, callbacks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mezo._arguments import check_trainer, checked_config, checked_path
from mezo._step import EvalResult, Run, StepResult, StepStatus, attach, checked_run
from mezo.config import MezoConfig
from mezo.data import Batch
from mezo.spsa import learning_rate

# Called after every step and every evaluation; None is what did not happen.
Callback = Callable[["Progress"], None]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback sees.

    Args:
        step: steps taken so far.
        num_steps: steps of the whole run.
        seconds: since training began, without evaluations.
        result: the step's result, or None after an evaluation.
        evaluation: the evaluation, or None after a step.
    """

    step: int
    num_steps: int
    seconds: float
    result: StepResult | None = None
    evaluation: EvalResult | None = None


@dataclasses.dataclass(frozen=True)
class TrainSummary:
    """What a training run did.

    Args:
        steps: steps taken.
        skipped: steps whose loss was not finite.
        seconds: spent in steps.
        tokens: computed by the engine in steps, prompts included.
        prompt_tokens: of these, tokens of prompts that run once on the base model (activated).
        reused_tokens: prompt tokens that rows took from the cache.
        before: held-out scores before the first step, or None.
        after: held-out scores after the last step, or None.
    """

    steps: int
    skipped: int
    seconds: float
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    before: EvalResult | None
    after: EvalResult | None


class MeZOTrainer:
    """Trains one attached adapter on a stream of batches.

    Args:
        run: from `mezo.attach`.
        batches: the training batches, one a step.
        num_steps: steps to take; the stream must be at least that long.
        schedule: learning rate: "constant", "linear" (to 0) or "cosine" (to 0).
        held_out: batches to evaluate on, before, after and every ``eval_every`` steps.
        eval_every: steps between evaluations, or None for before and after only.
        callbacks: called with a `Progress` after each step and evaluation.

    Raises:
        ValueError: ``num_steps`` < 1, an unknown schedule, ``eval_every`` < 1.
    """

    def __init__(
        self,
        run: Run,
        batches: Iterable[Batch],
        *,
        num_steps: int,
        schedule: str = "constant",
        held_out: Sequence[Batch] = (),
        eval_every: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        checked_run("MeZOTrainer", run)
        check_trainer(batches, held_out, callbacks, num_steps, eval_every)
        if num_steps < 1 or (eval_every is not None and eval_every < 1):
            raise ValueError(
                "MeZOTrainer: num_steps and eval_every must be at least 1, got "
                f"{num_steps} and {eval_every}; pass positive numbers."
            )
        learning_rate(1.0, 0, num_steps, schedule)  # an unknown schedule raises here
        self.run = run
        self.batches = batches
        self.num_steps = num_steps
        self.schedule = schedule
        self.held_out = [run.encode(batch) for batch in held_out]
        self.eval_every = eval_every
        self.callbacks = callbacks

    def train(self) -> TrainSummary:
        """Take all steps and return what they did.

        Raises:
            ValueError: a bad batch, or a stream that ends early.
        """
        seconds, tokens, prompt_tokens, reused, skipped = 0.0, 0, 0, 0, 0
        before = after = self.evaluate(0, seconds)
        stream = iter(self.batches)
        for number in range(self.num_steps):
            batch = next(stream, None)
            if batch is None:
                raise ValueError(
                    f"MeZOTrainer: batches must hold at least {self.num_steps} batches, "
                    f"got {number}; repeat the data or lower num_steps."
                )
            lr = learning_rate(self.run.config.lr, number, self.num_steps, self.schedule)
            started = time.perf_counter()
            result = self.run.step(batch, lr=lr)
            seconds += time.perf_counter() - started
            tokens += result.tokens
            prompt_tokens += result.prompt_tokens
            reused += result.reused_tokens
            skipped += result.status is not StepStatus.OK
            self._call(Progress(number + 1, self.num_steps, seconds, result=result))
            is_last = number + 1 == self.num_steps
            if is_last or (self.eval_every and (number + 1) % self.eval_every == 0):
                after = self.evaluate(number + 1, seconds)
        return TrainSummary(
            steps=self.num_steps,
            skipped=skipped,
            seconds=seconds,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            reused_tokens=reused,
            before=before,
            after=after,
        )

    def evaluate(self, step: int, seconds: float) -> EvalResult | None:
        """Score the held-out batches, pooled over their examples; None without any."""
        if not self.held_out:
            return None
        parts = [self.run.evaluate(batch) for batch in self.held_out]
        pooled = pool(parts)
        self._call(Progress(step, self.num_steps, seconds, evaluation=pooled))
        return pooled

    def _call(self, progress: Progress) -> None:
        for callback in self.callbacks:
            callback(progress)


def pool(parts: Sequence[EvalResult]) -> EvalResult:
    """Pool evaluations of several batches, weighted by their examples."""
    n = sum(p.num_examples for p in parts)
    loss = sum(p.loss * p.num_examples for p in parts) / n
    is_classification = all(p.accuracy is not None for p in parts)
    accuracy = sum((p.accuracy or 0.0) * p.num_examples for p in parts) / n
    guesses = [g for p in parts for g in p.predictions or ()]
    return EvalResult(
        loss=loss,
        accuracy=accuracy if is_classification else None,
        predictions=guesses if is_classification else None,
        num_examples=n,
        tokens=sum(p.tokens for p in parts),
    )


def finetune(
    engine: Any,
    batches: Iterable[Batch],
    *,
    num_steps: int,
    config: MezoConfig | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    **trainer_args: Any,
) -> TrainSummary:
    """Attach a fresh adapter, train it, save it as a PEFT adapter and take it out again.

    Args:
        engine: as in `mezo.attach`, or the path of a model: then an SGLang engine is started for
            the time of the call.
        batches: the training batches, one a step.
        num_steps: steps to take.
        config: the adapter and the estimator.
        tokenizer: see `mezo.attach`.
        output: directory for the adapter, or None to save nothing.
        trainer_args: further arguments of `MeZOTrainer`.

    Returns:
        The summary.
    """
    config = checked_config("finetune", config)
    if output is not None:
        checked_path("finetune: output", output)
    if isinstance(engine, (str, Path)):
        from mezo.sglang.launch import launch_engine

        started = launch_engine(str(engine), config)
        try:
            return finetune(
                started,
                batches,
                num_steps=num_steps,
                config=config,
                tokenizer=tokenizer,
                output=output,
                **trainer_args,
            )
        finally:
            started.shutdown()
    with attach(engine, config, tokenizer=tokenizer) as run:
        summary = MeZOTrainer(run, batches, num_steps=num_steps, **trainer_args).train()
        if output is not None:
            run.save(output)
        return summary
