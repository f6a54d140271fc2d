"""The self-test of a run: does this engine do to this model what the method needs?

`engine_checks` runs where the adapter lives, on any engine: it perturbs the slots, scores two short
rows of token ids, and compares numbers that must be equal to the bit, or must not. What belongs to
SGLang (its pool, its cache) is checked in `mezo.engines.sglang.selftest`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from mezo.core.messages import Check, StepRequest
from mezo.core.rows import BASE, THETA, Rows, pair_slots
from mezo.core.state import AdapterState
from mezo.core.step import ScoreFn, run_step
from mezo.data.batch import Batch, EncodedBatch
from mezo.engines import EngineError
from mezo.objectives.base import Targets

if TYPE_CHECKING:
    from mezo.run import Run

logger = logging.getLogger(__name__)

# Tried in this order until every perturbed slot moves the losses: in half precision a small
# perturbation of a strongly scaled-down adapter is lost to rounding, a large one can overflow.
_SCALES = (0.02, 0.2, 2.0)
_STEP = 0  # whose directions are used
GROUP = 8  # slots scored in one call beside the base model and theta


def quick(run: Run) -> list[Check]:
    """Run the quick self-test in the run's engine; leaves the run and the engine as they were.

    Args:
        run: an open run.

    Returns:
        All checks, passed or not.

    Cost: 5 forwards of two short rows with one direction, 2 more with each further one.
    """
    rows = sample_batch(run, lengths=(5, 3), scored=3).undivided().rows
    return run.session.selftest(rows)


def require_passed(run: Run) -> list[Check]:
    """`quick`, and an error for the first check that does not hold.

    Raises:
        EngineError: a check failed; the sentence names it, with the expected and found numbers.
    """
    checks = quick(run)
    is_sglang = run.session.engine_name != "transformers"
    for check in checks:
        if not check.is_ok:
            raise EngineError(
                f"attach: the self-test of run {run.name!r} must pass, but its check "
                f"{check.name!r} failed: {check.detail}; "
                f"{_TRAIN_ELSEWHERE if is_sglang else _LOOK} or pass selftest=False to go on all "
                "the same."
            )
        if check.is_skipped:
            logger.warning("run %r: self-test skipped: %s", run.name, check.detail)
    return checks


_TRAIN_ELSEWHERE = "attach the transformers model (engine='transformers'),"
_LOOK = "look at the model's weights, dtype and hooks, and at alpha,"


def sample_batch(run: Run, *, lengths: Sequence[int], scored: int) -> EncodedBatch:
    """Rows of token ids that any vocabulary has, with the run's invocation.

    Args:
        run: the run.
        lengths: prompt tokens of each row, cut to what the engine accepts.
        scored: completion tokens of each row.
    """
    session = run.session
    room = session.max_row_tokens - len(run.invocation.tokens) - scored
    ids = [1 + (7919 * (i + 1)) % max(session.vocab_size - 1, 1) for i in range(scored)]
    prompts = [
        [1 + (104729 * (k + 1) + 7907 * i) % max(session.vocab_size - 1, 1) for i in range(n)]
        for k, n in enumerate(max(1, min(n, room)) for n in lengths)
    ]
    return run.encode(Batch(prompts=prompts, completions=[ids] * len(prompts)))


def engine_checks(state: AdapterState, score: ScoreFn, rows: Rows) -> list[Check]:
    """Check an adapter's slots against what its engine's forward makes of them.

    Args:
        state: the adapter, on this rank.
        score: the engine's forward.
        rows: the rows to score, without prefixes.

    Returns:
        The checks. theta, its slot and its version are as before; the perturbed slots hold theta.
    """
    state.flush()
    before = (digest([state.arena]), state.version)
    slots = pair_slots(state.num_directions)
    try:
        sums, scale = _perturbed_sums(state, score, rows, slots)
        checks = [_applied(sums, slots, scale)]
        if checks[0].is_ok:
            checks.append(_right_slots(state, score, rows, slots, scale))
        # Theta's slot holds something else by now; whoever reads it next must get theta.
        state.restore()
        state.perturb(_STEP, 0.0)
        now = score(rows, [BASE, THETA, *slots[:GROUP]]).logprob_sums
    finally:
        state.restore()
        state.slot(THETA)
    # One batch, run twice with the same kernels, gives the same bits; others may round apart.
    slack = min(_distance(sums[slots[0]], sums[BASE]) / 8, _slack(state, sums[BASE]))
    checks += [
        _unmoved("theta's slot", "theta", sums[THETA], now[THETA], slack),
        _unmoved("base model", "the base model", sums[BASE], now[BASE], slack),
        _fresh(state, sums, now, slots),
        _pair(state, score, rows),
    ]
    after = (digest([state.arena]), state.version)
    is_same = before == after
    detail = f"digest and version of the fp32 weights {'stay' if is_same else 'were'} {before}"
    checks.append(
        Check("weights unchanged", is_same, detail + ("" if is_same else f", got {after}"))
    )
    return checks


def digest(tensors: Iterable[torch.Tensor]) -> int:
    """A number made of all bits of tensors, on their device: sums of words, weighted by place."""
    total = 0
    for i, tensor in enumerate(tensors):
        words = tensor.detach().view(_WORDS[tensor.element_size()])
        rows = words.sum(-1, dtype=torch.int64)
        weights = torch.arange(1, 2 * rows.numel(), 2, device=rows.device).view(rows.shape)
        total += (2 * i + 1) * int((rows * weights).sum())
    return total


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _perturbed_sums(
    state: AdapterState, score: ScoreFn, rows: Rows, slots: Sequence[str]
) -> tuple[dict[str, list[float]], float]:
    """Sums of all slots under the first scale that moves each of them, or the last."""
    for scale in _SCALES:
        state.perturb(_STEP, scale)
        sums: dict[str, list[float]] = {}
        for i in range(0, len(slots), GROUP):
            scored = score(rows, [BASE, THETA, *slots[i : i + GROUP]]).logprob_sums
            sums = {**scored, **sums}
        if _applied(sums, slots, scale).is_ok:
            break
    return sums, scale


def _applied(sums: dict[str, list[float]], slots: Sequence[str], scale: float) -> Check:
    """Whether each perturbed slot moves the losses."""
    name = "adapter applied"
    if not all(map(math.isfinite, sums[BASE])):
        return Check(name, False, f"the base model's sums must be finite, got {sums[BASE]}")
    for slot in slots:
        if not all(map(math.isfinite, sums[slot])) or sums[slot] == sums[BASE]:
            return Check(
                name,
                False,
                f"log-likelihoods under slot {slot}, theta perturbed by {scale} z, must be finite "
                f"and differ from the base model's {sums[BASE]}, got {sums[slot]}",
            )
    least = min(_distance(sums[slot], sums[BASE]) for slot in slots)
    return Check(
        name, True, f"{len(slots)} perturbed slots move the losses by {least:.3g} nats or more"
    )


def _right_slots(
    state: AdapterState, score: ScoreFn, rows: Rows, slots: Sequence[str], scale: float
) -> Check:
    """Whether rows of a slot, and rows of theta's, read what was written there.

    The content of each slot is written into theta's from the masters, not copied: a slot that lies
    elsewhere than its views say would be copied wrong in the same way.
    """
    for i, slot in enumerate(slots):
        sign = 1.0 if i < state.num_directions else -1.0
        state.show(_STEP, i % state.num_directions, sign * scale)
        sums = score(rows, [slot, THETA]).logprob_sums
        if sums[slot] != sums[THETA]:
            return Check(
                "right slots",
                False,
                f"slot {slot} and theta's slot hold the same weights and must give the same "
                f"log-likelihoods to the bit, got {sums[slot]} and {sums[THETA]}",
            )
    return Check("right slots", True, f"{len(slots)} slots and theta's are read as written")


def _unmoved(
    name: str, what: str, expected: Sequence[float], found: Sequence[float], bound: float
) -> Check:
    """Whether log-likelihoods are as they were at the start."""
    moved = _distance(expected, found)
    is_ok = moved <= bound
    detail = f"{what} gives the same log-likelihoods after the perturbations (bound {bound:.1g})"
    if not is_ok:
        detail = (
            f"{what} must give the log-likelihoods from before, {list(expected)}, "
            f"got {list(found)} (difference {moved:.3g}, bound {bound:.1g})"
        )
    return Check(name, is_ok, detail)


def _fresh(
    state: AdapterState,
    sums: dict[str, list[float]],
    now: dict[str, list[float]],
    slots: Sequence[str],
) -> Check:
    """Whether slots that hold theta give theta's losses, and a fresh theta the base model's."""
    name = "unperturbed slots"
    for slot in slots[:GROUP]:
        if now[slot] != now[THETA]:
            return Check(
                name,
                False,
                f"slot {slot} holds theta and must give its log-likelihoods to the bit, "
                f"{now[THETA]}, got {now[slot]}",
            )
    is_fresh = not any(
        bool(master.any())
        for spec, master in zip(state.specs, state.masters, strict=True)
        if spec.name.endswith("lora_B")
    )
    if is_fresh:
        # Rows of one batch, but through different kernels.
        bound = min(_distance(sums[slots[0]], sums[BASE]) / 8, 16 * _slack(state, sums[BASE]))
        moved = _distance(now[THETA], now[BASE])
        if not moved <= bound:
            return Check(
                name,
                False,
                f"an adapter with B = 0 must give the base model's log-likelihoods, {now[BASE]}, "
                f"got {now[THETA]} (difference {moved:.3g}, bound {bound:.1g})",
            )
    return Check(name, True, "slots that hold theta give its log-likelihoods to the bit")


def _pair(state: AdapterState, score: ScoreFn, rows: Rows) -> Check:
    """Whether a step with eps 0 finds no difference: L(theta, theta) = 0 to the bit."""
    counts = [len(t) - p for t, p in zip(rows.tokens, rows.prompt_lens, strict=True)]
    targets = Targets(counts=tuple(counts))
    request = StepRequest(step=_STEP, rows=rows, targets=targets, eps=0.0, lr=None)
    reply = run_step(state, score, request)
    plus, minus = reply.losses_plus, reply.losses_minus
    is_ok = plus == minus and all(map(math.isfinite, plus))
    detail = f"loss_plus and loss_minus at eps 0 are equal to the bit ({plus[0]:.6f} nats)"
    if not is_ok:
        k = next((k for k, (p, m) in enumerate(zip(plus, minus, strict=True)) if p != m), 0)
        detail = (
            f"loss_plus and loss_minus of one theta (eps 0, direction {k}) must be equal to the "
            f"bit, got {plus[k]!r} and {minus[k]!r} (difference {plus[k] - minus[k]:.3g})"
        )
    return Check("L(theta, theta) = 0", is_ok, detail)


def _slack(state: AdapterState, sums: Sequence[float]) -> float:
    """A few roundings of log-likelihoods in the slots' dtype, nats."""
    return 4 * float(torch.finfo(state.slot_dtype).eps) * max(1.0, *map(abs, sums))


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference of two rows of numbers, or NaN."""
    distances = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return math.nan if any(map(math.isnan, distances)) else max(distances)
