"""One MeZO step on one rank: perturb, score, estimate, update. The same code in every engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from mezo import objectives
from mezo.core.messages import StepReply, StepRequest
from mezo.core.rows import Rows, Scores, pair_slots
from mezo.core.state import AdapterState, is_safe
from mezo.objectives.base import Objective, Targets, signal_to_noise
from mezo.optim import ESTIMATORS, OPTIMIZERS, Estimate
from mezo.optim.estimate import clip_projected_grad

# Scores every row under every slot. The engine gets the slots of these names, and that of the
# rows' prefix, from `AdapterState.slot`.
ScoreFn = Callable[[Rows, Sequence[str]], Scores]


def run_step(state: AdapterState, score: ScoreFn, request: StepRequest) -> StepReply:
    """Run one step of n-SPSA on this rank.

    Args:
        state: the adapter; its update is deferred to the next perturbation or flush.
        score: the engine's forward.
        request: the batch and the scalars.

    Returns:
        The reply. With a non-finite loss the weights stay as they were.

    Raises:
        ValueError: a step that is to be taken, but is not the next one, or an unknown objective;
            nothing has changed then.
        TypeError, NotImplementedError: an objective, an estimator or an optimiser that returns
            something else than its protocol says; the step is not taken.
    """
    started = time.perf_counter()
    objective, targets = objectives.of(request.targets), request.targets
    if request.lr is not None:
        state.check_next(request.step)
    state.perturb(request.step, request.eps)
    state.slot(request.rows.prefix_adapter)  # written now, so that its time counts as the weights'
    lost_share = state.lost_share(request.eps)
    perturbed = time.perf_counter()
    slots = pair_slots(state.num_directions)
    scores = score(request.rows, slots)
    scored = time.perf_counter()
    sums = [scores.logprob_sums[slot] for slot in slots]
    # float(): what others write may return NumPy's numbers, which messages do not carry.
    losses = tuple(float(objective.loss(targets, values)) for values in sums)
    plus, minus = losses[: state.num_directions], losses[state.num_directions :]
    is_finite = all(math.isfinite(x) for x in losses)
    grads: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    if is_finite and request.eps != 0.0:
        grads = _projected_grads(request, plus, minus)
    if grads and request.lr is not None:
        coefficients = _coefficients(request, request.lr, grads)
        is_finite = all(map(is_safe, coefficients))
        if not is_finite:
            coefficients = ()
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


def _projected_grads(
    request: StepRequest, plus: Sequence[float], minus: Sequence[float]
) -> tuple[float, ...]:
    """The (clipped) estimate along each direction of the step."""
    estimates = ESTIMATORS[request.estimator].projected_grads(plus, minus, request.eps)
    if len(estimates) != len(plus):
        raise NotImplementedError(
            f"step: estimator {request.estimator!r} must return one number for each of the "
            f"{len(plus)} directions of step {request.step}, got {len(estimates)}; return 0.0 for "
            "a direction that is not to be followed."
        )
    return tuple(clip_projected_grad(float(value), request.clip) for value in estimates)


def _coefficients(request: StepRequest, lr: float, grads: tuple[float, ...]) -> tuple[float, ...]:
    """The optimiser's coefficient of each direction of the step."""
    history = [Estimate(request.step, lr, grads)]
    update = OPTIMIZERS[request.optimizer].coefficients(request.step, history)
    if [direction for direction, _ in update] != [(request.step, k) for k in range(len(grads))]:
        raise NotImplementedError(
            f"step: optimizer {request.optimizer!r} must return one coefficient for each of the "
            f"{len(grads)} directions of step {request.step}, in order, got {len(update)} for "
            "others; fold past directions into the coefficients of this step's."
        )
    return tuple(float(c) for _, c in update)


def _signal_to_noise(
    objective: Objective, targets: Targets, sums: Sequence[Sequence[float]]
) -> tuple[float | None, ...]:
    """Of each direction, from the sums of all plus slots, then all minus slots."""
    terms = [[float(x) for x in objective.example_losses(targets, values)] for values in sums]
    half = len(terms) // 2
    pairs = zip(terms[:half], terms[half:], strict=True)
    return tuple(signal_to_noise(plus, minus) for plus, minus in pairs)
