"""The training loop around `mezo.step`: schedule, evaluation, callbacks."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import ExitStack, suppress
from typing import Any

from mezo._arguments import check_trainer
from mezo._inputs import require
from mezo._signals import finishing
from mezo.config import TrainConfig
from mezo.data.batch import Batch, EncodedBatch
from mezo.optim.schedule import SCHEDULES, learning_rate
from mezo.results import EvalResult
from mezo.run import Run, checked_run
from mezo.train.best import Best
from mezo.train.callbacks import Callback, Listener, Progress
from mezo.train.checkpoints import Checkpoints
from mezo.train.evaluate import evaluate
from mezo.train.resume import Past
from mezo.train.summary import Tally, TrainSummary
from mezo.train.trainer_callbacks import TrainerCallbacks, apart, loop_values

logger = logging.getLogger(__name__)
_END = object()


class MeZOTrainer:
    """Trains one attached adapter on a stream of batches.

    What can be checked is checked here: of a sequence (a list, say) all batches are encoded now,
    and a length that is known is compared with ``num_steps``. What fails later leaves the run open,
    with the steps taken so far: `run.save` keeps them, and ``trainer.summary`` says what was done.

    Args:
        run: from `mezo.attach`.
        batches: the training batches, one per step.
        num_steps: steps to take. A stream that turns out to be shorter ends the training early.
        schedule: learning rate: "constant", "linear" (to 0) or "cosine" (to 0).
        held_out: batches to evaluate on, before, after and every ``eval_every`` steps.
        eval_every: steps between evaluations, or None for before and after only.
        callbacks: called with a `Progress` after each step and evaluation; functions, a
            `Listener`, or objects or classes of `transformers.TrainerCallback`.
        warmup_steps: steps in which the learning rate rises.
        steps_per_epoch: steps of a pass through the data; None where nobody knows.
        best: keeps the best adapter and may stop the training; None for neither.
        checkpoints: writes snapshots; None for none.
        metrics: (EvalResult of all held-out batches) -> {name: value}: what is computed besides;
            None for nothing.
        past: what was done before this training goes on; the run has taken its steps, and
            ``batches`` begin behind them. None: nothing.

    Raises:
        ValueError: ``num_steps`` < 1, an unknown schedule, ``eval_every`` < 1, fewer batches than
            steps, or a bad batch.
        TypeError: ``batches`` cannot be iterated over.
    """

    def __init__(
        self,
        run: Run,
        batches: Iterable[Batch | EncodedBatch],
        *,
        num_steps: int,
        schedule: str = TrainConfig.schedule,
        held_out: Sequence[Batch | EncodedBatch] = (),
        eval_every: int | None = TrainConfig.eval_every,
        callbacks: Sequence[Callback | Any] = (),
        warmup_steps: int = TrainConfig.warmup_steps,
        steps_per_epoch: int | None = None,
        best: Best | None = None,
        checkpoints: Checkpoints | None = None,
        metrics: Callable[[EvalResult], dict[str, float]] | None = None,
        past: Past | None = None,
    ) -> None:
        checked_run("MeZOTrainer", run)
        check_loop(batches, num_steps, schedule, eval_every, held_out, callbacks)
        self.run = run
        self.num_steps = num_steps
        self.batches = batches
        if isinstance(batches, Sequence):
            self.batches = _encoded(run, "batches", batches[:num_steps])
        self.schedule = schedule
        self.held_out = _encoded(run, "held_out", held_out)
        self.eval_every = eval_every
        theirs, others = apart(callbacks)
        self.callbacks = [*map(_listener, others)]
        if theirs:
            values = loop_values(run.config.lr, schedule, eval_every, best)
            values |= {"max_steps": num_steps, "warmup_steps": warmup_steps, "logging_steps": 1}
            self.callbacks.append(TrainerCallbacks(theirs, values))
        self.warmup_steps, self.steps_per_epoch = warmup_steps, steps_per_epoch
        self.best, self.checkpoints, self.metrics = best, checkpoints, metrics
        self.past = past
        self._tally = self._begun()

    @property
    def summary(self) -> TrainSummary:
        """What has been done so far, also after an exception."""
        return self._tally.summary(self.run.steps)

    @property
    def is_finished(self) -> bool:
        """Whether the loop has come to its end, by itself."""
        return self._tally.is_finished

    def train(self) -> TrainSummary:
        """Take all steps and return what they did.

        Returns:
            The summary. If the stream ended early its ``steps`` are fewer than ``num_steps``, and
            its ``problems`` say so.

        Raises:
            ValueError: a bad batch, or a stream without any.
            BaseException: whatever a batch, a callback or the engine raises, Ctrl-C included. The
                run is then open, with the steps taken so far.
        """
        try:
            return self.run_loop()
        except BaseException:
            if steps := self.summary.steps:
                logger.warning(
                    "MeZOTrainer: training stopped after %d of %d steps; run %r is open with their "
                    "weights, and run.save(directory) keeps them",
                    steps,
                    self.num_steps,
                    self.run.name,
                )
            raise

    def run_loop(self) -> TrainSummary:
        """`train`, for callers that save the adapter themselves when something is raised."""
        self._tally = self._begun()
        for callback in self.callbacks:
            callback.begin(self.num_steps)
        try:
            self._take_steps()
        except BaseException as error:
            self._tally.stopped_by = type(error).__name__
            self._note_last()
            raise
        finally:
            with ExitStack() as ends:  # one that fails keeps no other from hearing of it
                for callback in reversed(self.callbacks):
                    ends.callback(callback.end)
        for problem in self.summary.problems:
            logger.warning("run %r: %s", self.run.name, problem)
        return self.summary

    def _begun(self) -> Tally:
        """The sums of a training that begins, or of one that goes on."""
        if self.past is None:
            return Tally(self.num_steps, self.run.steps)
        tally = Tally(self.num_steps, self.run.steps - self.past.num_steps)
        for result, _ in self.past.steps:
            tally.add(result, result.timings["total"])
        scored = self.past.evaluations
        tally.before = scored.get(0)
        if scored:
            tally.evaluated_at = max(scored)
            tally.after = scored[tally.evaluated_at] if tally.evaluated_at else None
        return tally

    def _note_last(self) -> None:
        """Note a step that was taken, but interrupted before it was noted."""
        with suppress(Exception):  # the engine may be gone
            self.run.sync()
        last, tally = self.run.last_result, self._tally
        if last is not None and last.step == tally.first + tally.num_results:
            tally.add(last, last.timings["total"])
            with suppress(Exception):
                done = tally.num_results
                self._call(Progress(done, self.num_steps, tally.seconds, result=last))

    def _take_steps(self) -> None:
        tally, first = self._tally, self._tally.num_results
        if first == 0 and tally.before is None:
            tally.before = self.evaluate(0, 0.0)
        is_over = first > 0 and self._look_around(first)
        stream = iter(self.batches)
        for number in range(first, self.num_steps if not is_over else first):
            batch: Any = next(stream, _END)
            if batch is _END:
                require(
                    number > first,
                    f"MeZOTrainer: batches must hold at least {self.num_steps} batches, got none; "
                    "a generator can be used once only: make a new one.",
                )
                break
            lr = learning_rate(
                self.run.config.lr,
                number,
                self.num_steps,
                self.schedule,
                warmup_steps=self.warmup_steps,
            )
            done = number + 1
            for callback in self.callbacks:
                callback.step_begins(number, self._epoch(number))
            with finishing(self._say):
                started = time.perf_counter()
                result = self.run.step(batch, lr=lr)
                tally.add(result, time.perf_counter() - started)
                self._call(
                    Progress(
                        done,
                        self.num_steps,
                        tally.seconds,
                        result=result,
                        lr=lr,
                        epoch=self._epoch(done),
                    )
                )
            if is_over := self._look_around(done):
                break
        tally.is_stopped_early = is_over and tally.num_results < self.num_steps
        tally.has_ended = True
        if tally.evaluated_at != tally.num_results:
            tally.after = self.evaluate(tally.num_results, tally.seconds)
        tally.is_finished = True

    def _look_around(self, done: int) -> bool:
        """Evaluate and save where that is due behind a step; whether the training should stop."""
        tally, is_last = self._tally, done == self.num_steps
        is_due = self.eval_every is not None and done % self.eval_every == 0
        is_asked = self._asked("should_evaluate")
        if (is_last or is_due or is_asked) and tally.evaluated_at != done:
            tally.after = self.evaluate(done, tally.seconds)
        if self.checkpoints is not None and (
            self.checkpoints.is_due(done) or self._asked("should_save")
        ):
            self._save(done)
        is_over = self.best is not None and self.best.is_over
        return is_over or any(callback.should_stop for callback in self.callbacks)

    def _asked(self, what: str) -> bool:
        """Whether a callback has asked for something, which is then forgotten."""
        asked = [callback for callback in self.callbacks if getattr(callback, what)]
        for callback in asked:
            setattr(callback, what, False)
        return bool(asked)

    def _save(self, done: int) -> None:
        """Write a checkpoint."""
        assert self.checkpoints is not None
        path = self.checkpoints.save(self.run, done, best=self.best.step if self.best else None)
        for callback in self.callbacks:
            callback.saved(done, path)

    def _say(self, sentence: str) -> None:
        logger.warning("run %r: %s", self.run.name, sentence)

    def _epoch(self, done: int) -> float | None:
        """Passes through the data in ``done`` steps."""
        return None if self.steps_per_epoch is None else done / self.steps_per_epoch

    def evaluate(self, step: int, seconds: float) -> EvalResult | None:
        """Score the held-out batches, pooled over their examples; None without any."""
        if not self.held_out:
            return None
        pooled = evaluate(self.run, self.held_out)
        if self.metrics is not None:
            pooled = dataclasses.replace(pooled, metrics=dict(self.metrics(pooled)))
        self._tally.evaluated_at = step
        epoch = self._epoch(step)
        self._call(Progress(step, self.num_steps, seconds, evaluation=pooled, epoch=epoch))
        is_best = self.best is not None and self.best.note(self.run, step, pooled)
        if is_best and step and self.checkpoints is not None and self.checkpoints.keeps_best:
            self._save(step)
        return pooled

    def _call(self, progress: Progress) -> None:
        for callback in self.callbacks:
            callback(progress)


class _Function(Listener):
    """A plain function as a `Listener`."""

    def __init__(self, function: Callback) -> None:
        self._function = function

    def __call__(self, progress: Progress) -> None:
        self._function(progress)


def _listener(callback: Any) -> Listener:
    """A callback of ours as a listener."""
    return callback if isinstance(callback, Listener) else _Function(callback)


def check_loop(
    batches: Any,
    num_steps: Any,
    schedule: str,
    eval_every: Any,
    held_out: Any,
    callbacks: Any,
) -> None:
    """Check a training loop's arguments as far as that goes without a run.

    Raises:
        ValueError, TypeError: see `MeZOTrainer`.
    """
    check_trainer(batches, held_out, callbacks, num_steps, eval_every)
    require(
        num_steps >= 1 and (eval_every is None or eval_every >= 1),
        "MeZOTrainer: num_steps and eval_every must be at least 1, got "
        f"{num_steps} and {eval_every}; pass positive integers.",
    )
    SCHEDULES.check(schedule, "MeZOTrainer: ")
    length = _length(batches)
    require(
        length is None or length >= num_steps,
        f"MeZOTrainer: batches must hold at least {num_steps} batches, got {length}; repeat the "
        "data or lower num_steps.",
    )


def _length(batches: object) -> int | None:
    """The number of batches where it is known."""
    if not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError:  # a torch DataLoader of an iterable data set
        return None


def _encoded(run: Run, what: str, batches: Sequence[Batch | EncodedBatch]) -> list[EncodedBatch]:
    """Encode all batches of a list; a bad one is named by its place."""
    encoded = []
    for i, batch in enumerate(batches):
        try:
            encoded.append(run.encode(batch))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"MeZOTrainer: {what}[{i}] is bad: {error}") from error
    return encoded
