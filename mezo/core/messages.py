"""What callers ask of an engine and what it replies: a type for every operation.

The types are frozen dataclasses. `mezo.core.wire` says how they travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from mezo.config import MeZOConfig
from mezo.core.rows import Rows, Scores
from mezo.objectives.base import Targets
from mezo_kernels import TensorSpec

# The version of all messages. Raise it when a type or a field on this page, in `core.rows` or in
# `objectives.Targets` changes; each side refuses messages of another version.
VERSION = 5
# The name under which SGLang's RPC channel carries our messages.
METHOD = "mezo"


@dataclass(frozen=True)
class StepRequest:
    """Everything a rank needs for one step.

    Args:
        step: names the directions.
        rows: R token rows.
        targets: how the rows make a loss.
        eps: perturbation scale.
        lr: learning rate, or None to measure without an update.
        clip: bound on abs(projected_grad), or None.
        estimator: name of the estimator (see `mezo.optim`).
        optimizer: name of the optimiser.
    """

    step: int
    rows: Rows
    targets: Targets
    eps: float
    lr: float | None
    clip: float | None = None
    estimator: str = MeZOConfig.estimator
    optimizer: str = MeZOConfig.optimizer


@dataclass(frozen=True)
class StepReply:
    """The scalars of one step.

    Args:
        losses_plus: L(theta + eps z) of each direction, nats.
        losses_minus: L(theta - eps z) of each direction, nats.
        projected_grads: (clipped) estimates; empty when eps is 0.
        coefficients: c of each direction's update; empty when nothing was updated.
        signal_to_noise: abs(L+ - L-) of each direction over its standard error, or None.
        is_finite: whether losses are finite, and coefficients safe; if not, nothing was updated.
        tokens: tokens the engine computed, prompts included.
        forwards: forward batches it ran.
        prompt_tokens: of ``tokens``, those of shared prompts.
        reused_tokens: prompt tokens that came from the cache.
        weights_s: seconds spent on perturbation and update.
        score_s: seconds spent on the forward passes.
        lost_share: `AdapterState.lost_share` of this rank; None at eps 0.
        slot_dtype: dtype of the perturbed slots, as "bfloat16".
    """

    losses_plus: tuple[float, ...]
    losses_minus: tuple[float, ...]
    projected_grads: tuple[float, ...]
    coefficients: tuple[float, ...]
    signal_to_noise: tuple[float | None, ...]
    is_finite: bool
    tokens: int
    forwards: int
    prompt_tokens: int
    reused_tokens: int
    weights_s: float
    score_s: float
    lost_share: float | None
    slot_dtype: str


@dataclass(frozen=True)
class Check:
    """One check of a self-test.

    Args:
        name: what was checked.
        is_ok: whether it holds, or could not be checked.
        detail: the numbers: what was expected and what was found.
        is_skipped: whether it could not be checked; ``detail`` says why.
    """

    name: str
    is_ok: bool
    detail: str
    is_skipped: bool = False


@dataclass(frozen=True)
class Done:
    """The reply of an operation that has nothing to say."""


@dataclass(frozen=True)
class HelloReply:
    """What an engine is.

    Args:
        pids: process ids of all ranks.
        versions: {package: version}.
        max_row_tokens: the longest row it can score.
        vocab_size: token ids are below it.
        dtype: of the model, as "bfloat16".
        fp32_products: what fp32 products are computed in where that is not fp32; see `mezo._host`.
    """

    pids: tuple[int, ...]
    versions: dict[str, str]
    max_row_tokens: int
    vocab_size: int
    dtype: str
    fp32_products: str | None


@dataclass(frozen=True)
class AttachReply:
    """What an adapter became in the engine.

    Args:
        partners: shapes of the tensors that make fused projections whole and are not trained.
        not_served: why requests cannot name the run, or None.
        unnamed: why the tensors' names were not compared with PEFT's, or None.
    """

    partners: dict[str, tuple[int, ...]]
    not_served: str | None
    unnamed: str | None


@dataclass(frozen=True)
class SelftestReply:
    """The checks of all ranks: of each the first that failed, else rank 0's."""

    checks: tuple[Check, ...]


@dataclass(frozen=True)
class ProgressReply:
    """How many steps a run has taken, and the last one's reply: None for a known update."""

    steps: int
    last: StepReply | None


@dataclass(frozen=True)
class ExportReply:
    """The places of each rank's tensors; the values are in the file that the request names."""

    places: tuple[tuple[TensorSpec, ...], ...]


@dataclass(frozen=True)
class ProfileReply:
    """Seconds of each part of a step, on rank 0."""

    seconds: dict[str, float]


@dataclass(frozen=True)
class MemoryReply:
    """Free KV tokens, what the cache may and may not evict, free request slots, known adapters."""

    kv_tokens: int
    evictable_tokens: int
    protected_tokens: int
    request_slots: int
    adapters: int


@dataclass(frozen=True)
class FingerprintReply:
    """Digests of the base weights and of every slot of the pool, on rank 0."""

    base: str
    slots: dict[str, str]


R = TypeVar("R")


class Request(Generic[R]):
    """What a message asks for; the reply is an ``R``.

    Attributes:
        operation: its name on the wire.
        reply: the type of its reply, ``R``.
    """

    operation: ClassVar[str]
    reply: ClassVar[type[Any]]


@dataclass(frozen=True)
class Hello(Request[HelloReply]):
    """Ask what the engine is."""

    operation = "hello"
    reply = HelloReply


@dataclass(frozen=True)
class Attach(Request[AttachReply]):
    """Load a run's slots and make its state.

    Args:
        config: the run's configuration.
        uids: {slot name: the id under which the engine is to know the slot}.
        invocation: tokens from which an activated adapter acts; none for an ordinary one.
    """

    operation = "attach"
    reply = AttachReply
    config: MeZOConfig
    uids: dict[str, str]
    invocation: tuple[int, ...]


@dataclass(frozen=True)
class Step(Request[StepReply]):
    """Run one step of a run."""

    operation = "step"
    reply = StepReply
    run: str
    request: StepRequest


@dataclass(frozen=True)
class Profile(Request[ProfileReply]):
    """Run one step of a run under a stopwatch."""

    operation = "profile"
    reply = ProfileReply
    run: str
    request: StepRequest


@dataclass(frozen=True)
class Score(Request[Scores]):
    """Score rows under one of a run's slots, or under the base model."""

    operation = "score"
    reply = Scores
    run: str
    rows: Rows
    slot: str


@dataclass(frozen=True)
class Selftest(Request[SelftestReply]):
    """Check the engine with a run's own slots, on rows without prefixes."""

    operation = "selftest"
    reply = SelftestReply
    run: str
    rows: Rows


@dataclass(frozen=True)
class ApplyUpdates(Request[Done]):
    """Take steps whose coefficients are known; none is a skipped step.

    Args:
        run: the run.
        step: number of the first of them.
        coefficients: of each step.
    """

    operation = "apply_updates"
    reply = Done
    run: str
    step: int
    coefficients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Progress(Request[ProgressReply]):
    """Ask how many steps were taken."""

    operation = "progress"
    reply = ProgressReply
    run: str


@dataclass(frozen=True)
class Export(Request[ExportReply]):
    """Write the fp32 adapter of all ranks to a safetensors file."""

    operation = "export"
    reply = ExportReply
    run: str
    path: str


@dataclass(frozen=True)
class SetWeights(Request[Done]):
    """Put the weights of a safetensors file, whole tensors by name, in the place of a run's."""

    operation = "set_weights"
    reply = Done
    run: str
    path: str


@dataclass(frozen=True)
class Detach(Request[Done]):
    """Unload a run's slots; ``uids`` tell it from another run of this name."""

    operation = "detach"
    reply = Done
    run: str
    uids: dict[str, str]


@dataclass(frozen=True)
class Memory(Request[MemoryReply]):
    """Ask for free memory, to find leaks."""

    operation = "memory"
    reply = MemoryReply


@dataclass(frozen=True)
class Fingerprint(Request[FingerprintReply]):
    """Ask for digests of all weights, to see what changed."""

    operation = "fingerprint"
    reply = FingerprintReply


# {name of the operation: type of its request}
REQUESTS: dict[str, type[Request[Any]]] = {
    request.operation: request
    for request in (
        Hello,
        Attach,
        Step,
        Profile,
        Score,
        Selftest,
        ApplyUpdates,
        Progress,
        Export,
        SetWeights,
        Detach,
        Memory,
        Fingerprint,
    )
}
