"""What steps and evaluations return, and what is said when their numbers mean nothing."""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
from collections.abc import Sequence

from mezo import objectives
from mezo.core.messages import StepReply
from mezo.core.rounding import LOST_LIMIT
from mezo.objectives.base import Targets
from mezo.objectives.classification import option_scores

logger = logging.getLogger(__name__)
_MANY_IN_A_ROW = 10


class StepStatus(enum.Enum):
    """How a step ended; the value is a sentence.

    Only a step with NONFINITE_LOSS leaves the weights as they were. Of several that apply, the
    first in the order NONFINITE_LOSS, EQUAL_LOSSES, LOST_PERTURBATION is given.
    """

    OK = "The step was taken."
    NONFINITE_LOSS = "A loss or its update was not finite, so the weights were left as they were."
    EQUAL_LOSSES = (
        "Both losses were equal along every direction, so the step taken had length 0: the batch "
        "said nothing."
    )
    LOST_PERTURBATION = (
        "The step was taken, but rounding removed the perturbation of most elements of an adapter "
        "factor, so its estimate says little."
    )


class EvalStatus(enum.Enum):
    """How an evaluation ended; the value is a sentence."""

    OK = "Every example was scored."
    NONFINITE_SCORES = (
        "The loss or the scores of some examples were not finite; such examples have no prediction "
        "and the batch no accuracy."
    )


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step measured and did.

    Args:
        step: 0-based number of the step; names its directions.
        loss: mean of loss_plus and loss_minus, nats.
        loss_plus: L(theta + eps z), mean over directions, nats.
        loss_minus: L(theta - eps z), mean over directions, nats.
        losses: (plus, minus) of each direction, nats.
        projected_grads: the (clipped) estimate of each direction.
        coefficients: fp32-rounded by the kernels: theta <- fma(c, z, theta) of each direction.
        signal_to_noise: abs(L+ - L-) of each direction over its standard error, from the
            differences of the batch's examples; None where they are fewer than two or all equal.
        status: how the step ended.
        tokens: tokens the engine computed, by its own count, prompts included.
        prompt_tokens: of ``tokens``, those of prompts that run once on the base model (activated).
        reused_tokens: prompt tokens that rows got from the cache instead of computing them.
        forwards: forward batches the engine ran.
        timings: seconds: "total", "weights" (perturb and update), "score" (forward passes).
        lost_share: share of the adapter's elements that are equal in the plus and in the minus
            slot, because rounding to the slots' dtype removed the perturbation: the larger of
            lora_A's and lora_B's. Counted on rank 0 for the first direction, at the first step and
            again when eps has left its binade or theta has doubled. None at eps 0.
    """

    step: int
    loss: float
    loss_plus: float
    loss_minus: float
    losses: tuple[tuple[float, float], ...]
    projected_grads: tuple[float, ...]
    coefficients: tuple[float, ...]
    signal_to_noise: tuple[float | None, ...]
    status: StepStatus
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    forwards: int
    timings: dict[str, float]
    lost_share: float | None = None

    @classmethod
    def of(cls, step: int, reply: StepReply, *, total_s: float) -> StepResult:
        """Return the result of a step from its engine's reply.

        Args:
            step: its number.
            reply: the engine's.
            total_s: seconds that the whole call took.
        """
        losses = tuple(zip(reply.losses_plus, reply.losses_minus, strict=True))
        plus = sum(reply.losses_plus) / len(losses)
        minus = sum(reply.losses_minus) / len(losses)
        return cls(
            step=step,
            loss=0.5 * (plus + minus),
            loss_plus=plus,
            loss_minus=minus,
            losses=losses,
            projected_grads=reply.projected_grads,
            coefficients=reply.coefficients,
            signal_to_noise=reply.signal_to_noise,
            status=step_status(losses, is_finite=reply.is_finite, lost_share=reply.lost_share),
            tokens=reply.tokens,
            prompt_tokens=reply.prompt_tokens,
            reused_tokens=reply.reused_tokens,
            forwards=reply.forwards,
            timings={"total": total_s, "weights": reply.weights_s, "score": reply.score_s},
            lost_share=reply.lost_share,
        )


class StepError(RuntimeError):
    """A step's status was not OK and the caller asked for an exception.

    Attributes:
        result: the step's `StepResult`; what its status says has happened.
    """

    result: StepResult | None = None  # not an argument: exceptions are pickled with their arguments


class NonfiniteLossError(StepError):
    """A loss or its update was not finite; the weights are as they were."""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Scores of a batch under one set of weights.

    Args:
        loss: nats, as in training; NaN or inf as measured.
        accuracy: share of examples whose right option scores best; None for completions, and
            where some example's scores are not finite.
        predictions: index of the best option of each example, None where its scores are NaN, +inf
            or all -inf; None for completions.
        num_examples: examples scored.
        tokens: tokens the engine computed.
        num_nonfinite: examples without a prediction, or completions without a finite score.
        scores: mean token log-likelihood (nats) of each option of each example, or of each
            completion.
        labels: index of the right option of each example; None for completions.
        metrics: {name: value}: what else was computed from these, see `mezo.train.metrics`.
        loss_tokens: completion tokens that the loss is the mean of; None where it is the mean of
            examples.
    """

    loss: float
    accuracy: float | None
    predictions: list[int | None] | None
    num_examples: int
    tokens: int
    num_nonfinite: int = 0
    scores: list[list[float]] | None = dataclasses.field(default=None, compare=False, repr=False)
    labels: list[int] | None = dataclasses.field(default=None, compare=False, repr=False)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    loss_tokens: int | None = None

    @property
    def status(self) -> EvalStatus:
        """How the evaluation ended."""
        is_ok = math.isfinite(self.loss) and self.num_nonfinite == 0
        return EvalStatus.OK if is_ok else EvalStatus.NONFINITE_SCORES


def evaluation(targets: Targets, logprob_sums: Sequence[float], tokens: int) -> EvalResult:
    """Turn an engine's scores of a batch into the user's result."""
    objective = objectives.of(targets)
    loss = objective.loss(targets, logprob_sums)
    guesses = objective.predictions(targets, logprob_sums)
    if guesses is None:
        lost = sum(not math.isfinite(value) for value in logprob_sums)
        means = [[s / n] for s, n in zip(logprob_sums, targets.counts, strict=True)]
        count = sum(targets.counts)
        return EvalResult(
            loss, None, None, len(means), tokens, lost, scores=means, loss_tokens=count
        )
    assert targets.labels is not None
    lost, n = guesses.count(None), len(guesses)
    hits = sum(g == label for g, label in zip(guesses, targets.labels, strict=True))
    return EvalResult(
        loss,
        None if lost else hits / n,
        guesses,
        n,
        tokens,
        lost,
        scores=option_scores(targets, logprob_sums),
        labels=list(targets.labels),
    )


def step_status(
    losses: Sequence[tuple[float, float]], *, is_finite: bool, lost_share: float | None
) -> StepStatus:
    """Return how a step ended; see `StepStatus`. ``lost_share`` is None where eps is 0."""
    if not is_finite:
        return StepStatus.NONFINITE_LOSS
    if lost_share is None:
        return StepStatus.OK
    if all(plus == minus for plus, minus in losses):
        return StepStatus.EQUAL_LOSSES
    if is_lost(lost_share):
        return StepStatus.LOST_PERTURBATION
    return StepStatus.OK


def is_lost(lost_share: float | None) -> bool:
    """Whether rounding removed so much of a perturbation that it counts as lost."""
    return lost_share is not None and lost_share > LOST_LIMIT


def raise_for(result: StepResult) -> None:
    """Raise a `StepError` unless the step's status is OK."""
    if result.status is StepStatus.OK:
        return
    error: StepError
    if result.status is StepStatus.NONFINITE_LOSS:
        error = NonfiniteLossError(
            f"step {result.step}: losses and their update must be finite, got losses "
            f"{result.loss_plus} and {result.loss_minus}; lower lr or change eps."
        )
    else:
        error = StepError(
            f"step {result.step}: status must be OK, got {result.status.name}: "
            f"{result.status.value} Its update is applied; change eps, or use slots of a wider "
            "dtype."
        )
    error.result = result
    raise error


class StepWatch:
    """Says in the log, once each, when the numbers of a run stop to mean something.

    Args:
        name: the run's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kept = 2.0 * (1.0 - LOST_LIMIT)  # half of it is warned of
        self._has_equal = self._has_skipped = False
        self._in_a_row = 0

    def __call__(self, result: StepResult, *, eps: float, dtype: str) -> None:
        """Look at a result."""
        skipped = result.status is StepStatus.NONFINITE_LOSS
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped:
            self._warn_of_skips(result)
        remedy = "raise eps" if dtype == "float32" else "raise eps, or start the engine in float32"
        if result.status is StepStatus.EQUAL_LOSSES and not self._has_equal:
            self._has_equal = True
            logger.warning(
                "run %r, step %d: both losses were equal (%r, at eps %g with slots in %s) along "
                "every direction, so the step had length 0; %s, or look whether the batch can "
                "still teach anything",
                self._name,
                result.step,
                result.loss_plus,
                eps,
                dtype,
                remedy,
            )
        kept = 1.0 - (result.lost_share or 0.0)
        # Weights that have diverged swallow any eps; what matters then is said above.
        if not skipped and is_lost(result.lost_share) and kept < 0.5 * self._kept:
            self._kept = kept
            logger.warning(
                "run %r, step %d: rounding to %s removed the perturbation of %.0f %% of an adapter "
                "factor's elements at eps %g, so the estimates say little; %s",
                self._name,
                result.step,
                dtype,
                100.0 * (result.lost_share or 0.0),
                eps,
                remedy,
            )

    def _warn_of_skips(self, result: StepResult) -> None:
        """The first one, and the last of many in a row."""
        if not self._has_skipped:
            self._has_skipped = True
            logger.warning(
                "run %r, step %d: a loss or its update was not finite (losses %r and %r), so the "
                "step was skipped; lower lr, or change eps",
                self._name,
                result.step,
                result.loss_plus,
                result.loss_minus,
            )
        if self._in_a_row == _MANY_IN_A_ROW:
            logger.warning(
                "run %r: steps %d to %d were all skipped, because losses were not finite; the "
                "weights have most likely diverged: go back to a saved adapter with a lower lr",
                self._name,
                result.step - _MANY_IN_A_ROW + 1,
                result.step,
            )
