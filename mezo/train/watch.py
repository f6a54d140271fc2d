"""Warnings about a training that runs but will not learn, each with what to do about it."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from mezo.data.batch import EncodedBatch
from mezo.results import StepResult
from mezo.run import Run
from mezo.train.callbacks import Listener, Progress

logger = logging.getLogger(__name__)

WINDOW = 50  # steps that a judgement needs
_LARGE_EPS = 3.0  # times the rms of lora_A's weights: the perturbation is then most of the weight
_SMALL_EPS = 1e-4  # times the same: the losses then differ by less than their rounding
_DIVERGING = 10.0  # times the mean abs(projected_grad) of the first window
_SPACING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


class Watch(Listener):
    """Looks at the steps of a training; says each thing once.

    Args:
        run: the run, before its first step.
        say: what to do with a sentence; None: a warning in the log.
    """

    def __init__(self, run: Run, say: Callable[[str], None] | None = None) -> None:
        self._run = run
        self._say_it = say or logger.warning
        self._said: set[str] = set()
        self._grads: list[float] = []
        self._first_mean: float | None = None
        self._noisy = 0
        self._moves: deque[float] = deque(maxlen=WINDOW)
        self._rms = _rms_of_a(run.weights())

    def begin(self, num_steps: int) -> None:
        """Compare eps with the weights."""
        eps = self._run.config.eps
        if self._rms > 0 and not _SMALL_EPS <= eps / self._rms <= _LARGE_EPS:
            verb = "lower" if eps > self._rms else "raise"
            self._say(
                "eps",
                f"eps is {eps:g} where lora_A's weights have an rms of {self._rms:.2g}; {verb} eps "
                f"to about {0.1 * self._rms:.1g}, or the losses say little about the weights",
            )

    def __call__(self, progress: Progress) -> None:
        """Look at a step."""
        result = progress.result
        if result is None or not result.coefficients:
            return
        self._look_at_noise(result)
        self._look_at_gradients(result)
        self._look_at_updates(result)

    def _look_at_noise(self, result: StepResult) -> None:
        found = [x for x in result.signal_to_noise if x is not None]
        self._noisy = self._noisy + 1 if found and max(found) < 1.0 else 0
        if self._noisy == WINDOW:
            self._say(
                "noise",
                f"signal_to_noise was below 1 in the last {WINDOW} steps, so that the sign of "
                "projected_grad is that of the batch's draw; raise the batch size or eps, or give "
                "more directions",
            )

    def _look_at_gradients(self, result: StepResult) -> None:
        self._grads.append(sum(map(abs, result.projected_grads)) / len(result.projected_grads))
        if len(self._grads) < WINDOW:
            return
        mean = math.fsum(self._grads) / WINDOW
        self._grads.clear()
        if self._first_mean is None:
            self._first_mean = mean
        elif mean > _DIVERGING * self._first_mean:
            self._say(
                "diverging",
                f"abs(projected_grad) has grown from {self._first_mean:.3g} in the first {WINDOW} "
                f"steps to {mean:.3g}; lower lr, or give clip {2 * self._first_mean:.2g}",
            )

    def _look_at_updates(self, result: StepResult) -> None:
        self._moves.append(math.sqrt(math.fsum(c * c for c in result.coefficients)))
        dtype = str(self._run.session.dtype).removeprefix("torch.")
        least = 0.5 * _SPACING.get(dtype, 0.0) * self._rms
        if len(self._moves) == WINDOW and max(self._moves) * math.sqrt(WINDOW) < least:
            self._say(
                "rounding",
                f"the last {WINDOW} updates together are smaller than what {dtype} can tell apart "
                f"(at most {max(self._moves):.1e} each beside weights of {self._rms:.1e}); raise "
                "lr, or start the engine in float32",
            )

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say_it(f"run {self._run.name!r}: {sentence}")


def check_rows(run: Run, batch: EncodedBatch, say: Callable[[str], None] | None = None) -> None:
    """Warn of options that begin with the same token, and of a cache smaller than the prompts.

    Args:
        run: the run.
        batch: all training examples.
        say: what to do with a sentence; None: a warning in the log.
    """
    say = say or logger.warning
    sizes = batch.targets.num_options
    if sizes and (shared := _shared_beginnings(batch)):
        say(
            f"run {run.name!r}: options of {shared} of {len(sizes)} examples begin with the same "
            "token, so that they differ by later tokens only; choose words that begin differently, "
            "or write them without their common beginning"
        )
    capacity = getattr(run.session, "cache_tokens", None)
    if run.config.prefix != "activated" or capacity is None:
        return
    needed = sum(map(len, batch.prompts()))
    if needed > capacity():
        say(
            f"run {run.name!r}: the prompts of one epoch have {needed} tokens and the engine's "
            f"cache has room for {capacity()}, so that prompts are computed again in each epoch; "
            "give the engine a larger max_total_tokens (engine_args), or train on fewer examples "
            "(max_train_samples)"
        )


def _shared_beginnings(batch: EncodedBatch) -> int:
    """Examples of which two options begin with the same token."""
    rows, start, found = batch.rows, 0, 0
    for size in batch.targets.num_options or ():
        firsts = [rows.tokens[i][rows.prompt_lens[i]] for i in range(start, start + size)]
        found += len(set(firsts)) < size
        start += size
    return found


def _rms_of_a(weights: dict[str, torch.Tensor]) -> float:
    """The rms of lora_A's elements; lora_B begins at 0."""
    parts: Sequence[torch.Tensor] = [v for n, v in weights.items() if n.endswith("lora_A")]
    total = sum(float(part.double().square().sum()) for part in parts)
    count = sum(part.numel() for part in parts)
    return math.sqrt(total / count) if count else 0.0
