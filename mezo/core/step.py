"""One MeZO step on one rank: perturb, score, estimate, update. The same code in every engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mezo import objectives
from mezo.config import MezoConfig
from mezo.core.state import AdapterState, is_fp32
from mezo.data.batch import THETA, Rows
from mezo.objectives.base import Objective, Targets, signal_to_noise
from mezo.optim import ESTIMATORS, OPTIMIZERS, Estimate
from mezo.optim.estimate import clip_projected_grad


def pair_slots(num_directions: int) -> list[str]:
    """The names of the perturbed slots, all plus first: plus0, plus1, ..., minus0, minus1, ..."""
    return [f"{sign}{k}" for sign in ("plus", "minus") for k in range(num_directions)]


@dataclass(frozen=True)
class Scores:
    """What an engine's forward returns: one number a row and slot, and what it cost.

    Args:
        logprob_sums: {slot: R sums of completion-token log-likelihoods, nats; a logit where
            `Rows.is_normalised` says that it will do}.
        tokens: tokens the engine computed, by its own count, prompts included.
        forwards: forward batches it took.
        prompt_tokens: of ``tokens``, those computed on the base model for a shared prompt.
        reused_tokens: prompt tokens that rows took from the cache instead of computing them.
    """

    logprob_sums: dict[str, list[float]]
    tokens: int
    forwards: int
    prompt_tokens: int = 0
    reused_tokens: int = 0


# Every row runs under every slot.
ScoreFn = Callable[[Rows, Sequence[str]], Scores]


@dataclass(frozen=True)
class StepRequest:
    """Everything a rank needs for one step; plain data, sent as JSON.

    Args:
        step: names the directions.
        rows: R token rows.
        counts: completion tokens of each row.
        num_options: rows of each example, or None (see `Targets`).
        labels: right option of each example, or None.
        eps: perturbation scale.
        lr: learning rate, or None to measure without an update.
        clip: bound on abs(projected_grad), or None.
        objective: name of the loss, or None (see `Targets`).
        estimator: name of the estimator.
        optimizer: name of the optimiser.
    """

    step: int
    rows: Rows
    counts: Sequence[int]
    num_options: Sequence[int] | None
    labels: Sequence[int] | None
    eps: float
    lr: float | None
    clip: float | None = None
    objective: str | None = None
    estimator: str = MezoConfig.estimator
    optimizer: str = MezoConfig.optimizer

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StepRequest:
        """Undo ``dataclasses.asdict``."""
        return cls(**{**fields, "rows": Rows(**fields["rows"])})

    @property
    def targets(self) -> Targets:
        """How the rows make a loss."""
        options, labels = self.num_options, self.labels
        return Targets(
            counts=tuple(self.counts),
            num_options=None if options is None else tuple(options),
            labels=None if labels is None else tuple(labels),
            objective=self.objective,
        )


@dataclass(frozen=True)
class StepReply:
    """The scalars of one step.

    Args:
        losses_plus: L(theta + eps z) of each direction, nats.
        losses_minus: L(theta - eps z) of each direction, nats.
        projected_grads: (clipped) estimates; empty when eps is 0.
        coefficients: c of each direction's update; empty when nothing was updated.
        signal_to_noise: abs(L+ - L-) of each direction over its standard error, or None.
        is_finite: whether losses and coefficients are finite in fp32; if not, nothing was updated.
        tokens: tokens the engine computed, prompts included.
        forwards: forward batches it took.
        prompt_tokens: of ``tokens``, those of shared prompts.
        reused_tokens: prompt tokens taken from the cache.
        weights_s: seconds spent on perturbation and update.
        score_s: seconds spent on the forward passes.
        lost_share: `AdapterState.lost_share` of this rank; None at eps 0.
        slot_dtype: dtype of the perturbed slots, as "bfloat16".
    """

    losses_plus: list[float]
    losses_minus: list[float]
    projected_grads: list[float]
    coefficients: list[float]
    signal_to_noise: list[float | None]
    is_finite: bool
    tokens: int
    forwards: int
    prompt_tokens: int
    reused_tokens: int
    weights_s: float
    score_s: float
    lost_share: float | None
    slot_dtype: str


def run_step(state: AdapterState, score: ScoreFn, request: StepRequest) -> StepReply:
    """Run one step of n-SPSA on this rank.

    Args:
        state: the adapter; its update is deferred to the next perturbation or flush.
        score: the engine's forward.
        request: the batch and the scalars.

    Returns:
        The reply. With a non-finite loss the weights stay as they were.

    Raises:
        ValueError: a step that is to be taken, but is not the next one; nothing has changed then.
    """
    started = time.perf_counter()
    if request.lr is not None:
        state.check_next(request.step)
    state.perturb(request.step, request.eps)
    if request.rows.prefix_adapter == THETA:
        state.publish()
    lost_share = state.lost_share(request.eps)
    perturbed = time.perf_counter()
    slots = pair_slots(state.num_directions)
    scores = score(request.rows, slots)
    scored = time.perf_counter()
    sums = [scores.logprob_sums[slot] for slot in slots]
    objective, targets = objectives.of(request.targets), request.targets
    losses = [objective.loss(targets, values) for values in sums]
    plus, minus = losses[: state.num_directions], losses[state.num_directions :]
    is_finite = all(math.isfinite(x) for x in losses)
    grads: list[float] = []
    coefficients: list[float] = []
    if is_finite and request.eps != 0.0:
        estimates = ESTIMATORS[request.estimator].projected_grads(plus, minus, request.eps)
        grads = [clip_projected_grad(value, request.clip) for value in estimates]
    if grads and request.lr is not None:
        coefficients = _coefficients(request, request.lr, grads)
        is_finite = all(map(is_fp32, coefficients))
        if not is_finite:
            coefficients = []
    reply = StepReply(
        losses_plus=plus,
        losses_minus=minus,
        projected_grads=grads,
        coefficients=coefficients,
        signal_to_noise=_signal_to_noise(objective, targets, sums),
        is_finite=is_finite,
        tokens=scores.tokens,
        forwards=scores.forwards,
        prompt_tokens=scores.prompt_tokens,
        reused_tokens=scores.reused_tokens,
        weights_s=perturbed - started,
        score_s=scored - perturbed,
        lost_share=lost_share,
        slot_dtype=str(state.slot_dtype).removeprefix("torch."),
    )
    if request.lr is not None:
        state.take_step(request.step, coefficients, reply)
    return reply


def _coefficients(request: StepRequest, lr: float, grads: Sequence[float]) -> list[float]:
    """The optimiser's coefficient of each direction of the step."""
    history = [Estimate(request.step, lr, tuple(grads))]
    update = OPTIMIZERS[request.optimizer].coefficients(request.step, history)
    if [direction for direction, _ in update] != [(request.step, k) for k in range(len(grads))]:
        raise NotImplementedError(
            f"step: optimizer {request.optimizer!r} must return one coefficient for each of the "
            f"{len(grads)} directions of step {request.step}, in order, got {len(update)} for "
            "others; fold past directions into the coefficients of this step's."
        )
    return [c for _, c in update]


def _signal_to_noise(
    objective: Objective, targets: Targets, sums: Sequence[Sequence[float]]
) -> list[float | None]:
    """Of each direction, from the sums of all plus slots, then all minus slots."""
    terms = [objective.example_losses(targets, values) for values in sums]
    half = len(terms) // 2
    return [signal_to_noise(p, m) for p, m in zip(terms[:half], terms[half:], strict=True)]
