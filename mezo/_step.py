"""`attach`, `step` and `Run`: the loop's view of an adapter in an engine."""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mezo.adapter import save_peft
from mezo.config import MezoConfig
from mezo.core import StepReply, StepRequest
from mezo.data import BASE, THETA, Batch, EncodedBatch, encode, encode_invocation
from mezo.objectives import batch_loss, predictions

if TYPE_CHECKING:
    from mezo.engines.base import Session


logger = logging.getLogger(__name__)


class StepStatus(enum.Enum):
    """How a step ended; the value is a sentence."""

    OK = "The step was taken."
    NONFINITE_LOSS = "A loss or its update was not finite, so the weights were left as they were."


class NonfiniteLossError(RuntimeError):
    """A loss was not finite and the caller asked for an exception."""


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
        reused_tokens: prompt tokens that rows took from the cache instead of computing them.
        forwards: forward batches the engine ran.
        timings: seconds: "total", "weights" (perturb and update), "score" (forward passes).
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


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Scores of a batch under one set of weights.

    Args:
        loss: nats, as in training.
        accuracy: share of examples whose right option scores best; None for completions.
        predictions: index of the best option of each example; None for completions.
        num_examples: examples scored.
        tokens: tokens the engine computed.
    """

    loss: float
    accuracy: float | None
    predictions: list[int] | None
    num_examples: int
    tokens: int


class Run:
    """An adapter being trained in an engine. Made by `attach`; also a context manager.

    Attributes:
        name: the adapter's name; SGLang serves it under ``lora_path=run.name``.
        config: the run's `MezoConfig`.
        steps: steps taken so far; the next step's number.
        session: the engine's side.
        invocation: the tokens between every prompt and its completion.
    """

    def __init__(self, session: Session, config: MezoConfig) -> None:
        self.session = session
        self.config = config
        self.name = config.name
        self.steps = 0
        self.invocation = encode_invocation(
            config.invocation, session.tokenizer, prefix=config.prefix
        )
        self._is_closed = False
        if config.prefix == "detached":
            logger.warning(
                "run %r: prefix 'detached' is an approximation, it drops the prompt's part of the "
                "derivative; mezo.prefix_bias(run, batches) measures by how much",
                config.name,
            )

    def encode(self, batch: Batch | EncodedBatch) -> EncodedBatch:
        """Turn a batch into token rows, checking it against the engine's limits."""
        if isinstance(batch, EncodedBatch):
            return batch
        return encode(
            batch,
            self.session.tokenizer,
            invocation=self.invocation,
            max_row_tokens=self.session.max_row_tokens,
            vocab_size=self.session.vocab_size,
        )

    def step(
        self, batch: Batch | EncodedBatch, *, lr: float | None = None, throw: bool = False
    ) -> StepResult:
        """Take one step; see `mezo.step`."""
        started = time.perf_counter()
        self._check_open()
        rate = self.config.lr if lr is None else lr
        reply = self.session.step(self.request(batch, lr=rate))
        result = _result(self.steps, reply, time.perf_counter() - started)
        self.steps += 1
        if throw and result.status is not StepStatus.OK:
            raise NonfiniteLossError(
                f"step {result.step}: losses and their update must be finite, got losses "
                f"{result.loss_plus} and {result.loss_minus}; lower lr or change eps."
            )
        return result

    def pair_losses(self, batch: Batch | EncodedBatch, *, eps: float | None = None) -> StepResult:
        """Measure both losses along the next step's directions without updating anything.

        Args:
            batch: the batch.
            eps: perturbation scale, default ``config.eps``; at 0 both losses are those of theta,
                and their difference is the engine's noise floor.
        """
        return self.measure(batch, eps=eps)

    def measure(
        self, batch: Batch | EncodedBatch, *, eps: float | None = None, offset: int = 0
    ) -> StepResult:
        """`pair_losses` along the directions of the step ``offset`` behind the next one."""
        started = time.perf_counter()
        self._check_open()
        number = self.steps + offset
        reply = self.session.step(self.request(batch, step=number, eps=eps))
        return _result(number, reply, time.perf_counter() - started)

    def evaluate(self, batch: Batch | EncodedBatch, *, base: bool = False) -> EvalResult:
        """Score a batch under the current adapter, or under the base model alone."""
        self._check_open()
        encoded = self.encode(batch)
        slot = BASE if base else THETA
        scores = self.session.score(encoded.rows, slot)
        sums, targets = scores.logprob_sums[slot], encoded.targets
        loss = batch_loss(targets, sums)
        if not targets.is_classification:
            return EvalResult(loss, None, None, len(encoded.rows), scores.tokens)
        assert targets.labels is not None
        guesses = predictions(targets, sums)
        hits = sum(g == label for g, label in zip(guesses, targets.labels, strict=True))
        n = len(targets.labels)
        return EvalResult(loss, hits / n, guesses, n, scores.tokens)

    def apply_update(self, coefficients: Sequence[float]) -> None:
        """Take a step whose coefficients are known already, as replay does.

        Args:
            coefficients: one a direction; an empty list is a skipped step.
        """
        self._check_open()
        if len(coefficients) not in (0, self.config.num_directions):
            raise ValueError(
                "apply_update: coefficients must have one entry for each of the "
                f"{self.config.num_directions} directions, got {len(coefficients)}; "
                "pass StepResult.coefficients."
            )
        if coefficients:
            self.session.apply_update(self.steps, list(coefficients))
        self.steps += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the current adapter, {canonical name: fp32 tensor on the CPU}."""
        self._check_open()
        return self.session.weights()

    def save(self, directory: str | Path) -> Path:
        """Write the current adapter as a PEFT adapter; see `mezo.adapter.save_peft`."""
        return save_peft(
            self.weights(),
            self.config,
            directory,
            base_model=self.session.model_path or None,
            alora_invocation_tokens=(
                self.invocation.tokens if self.config.prefix == "activated" else None
            ),
            partners=self.session.partners,
        )

    def close(self) -> None:
        """Take the adapter out of the engine. Unsaved weights are gone; closing twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            self.session.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def request(
        self,
        batch: Batch | EncodedBatch,
        *,
        step: int | None = None,
        eps: float | None = None,
        lr: float | None = None,
    ) -> StepRequest:
        """Return what a step sends to the engine; by default the next step's, without an update."""
        encoded = self.encode(batch)
        return StepRequest(
            step=self.steps if step is None else step,
            rows=encoded.rows,
            counts=encoded.targets.counts,
            num_options=encoded.targets.num_options,
            labels=encoded.targets.labels,
            eps=self.config.eps if eps is None else eps,
            lr=lr,
            clip=self.config.clip,
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(
                f"run {self.name!r} must be open, got a closed one; attach the engine again."
            )


def attach(engine: Any, config: MezoConfig | None = None, *, tokenizer: Any = None) -> Run:
    """Put a fresh LoRA adapter into an engine, ready to be trained.

    Args:
        engine: an ``sglang.Engine`` started with ``enable_lora=True`` (see `mezo.launch_engine`),
            or a Hugging Face causal language model.
        config: the adapter and the estimator; default ``MezoConfig()``.
        tokenizer: for a Hugging Face model: its tokenizer, if batches hold text.

    Returns:
        The run.

    Raises:
        ValueError: the engine's LoRA pool is too small for the adapter (rank, modules, slots).
        NotImplementedError: the engine runs in a mode that MeZO does not support.
        RuntimeError: the mezo plugin is not loaded in the engine's scheduler processes.
        TypeError: ``engine`` is neither of the two.
    """
    config = config or MezoConfig()
    session: Session
    if isinstance(engine, torch.nn.Module):
        from mezo.engines.transformers import TransformersSession

        session = TransformersSession(engine, config, tokenizer)
    elif hasattr(engine, "collective_rpc") and hasattr(engine, "server_args"):
        from mezo.sglang.session import SglangSession

        session = SglangSession(engine, config)
    else:
        raise TypeError(
            "attach: engine must be an sglang.Engine or a Hugging Face causal language model, "
            f"got {type(engine).__name__}; make one with mezo.launch_engine(model_path, config)."
        )
    return Run(session, config)


def step(
    run: Run, batch: Batch | EncodedBatch, *, lr: float | None = None, throw: bool = False
) -> StepResult:
    """Take one MeZO step: two losses of one batch, then a step along z.

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps);   theta <- theta - lr g z

    Args:
        run: from `attach`.
        batch: what to train on.
        lr: learning rate of this step, default ``run.config.lr``.
        throw: raise instead of returning a status when a loss is not finite.

    Returns:
        The losses, the projected gradients and what they cost. The update is fused with the next
        step's perturbation; everything that reads the weights sees it applied.

    Raises:
        ValueError: a bad batch; nothing has changed then.
        NonfiniteLossError: see ``throw``.

    Numerics: losses from fp32 log-likelihoods, summed in float64; theta in fp32. A run is a
        function of (seed, batches), and theta of (seed, coefficients), bit for bit.
    Source: Malladi et al. 2023 (arXiv 2305.17333), Algorithm 1.
    """
    return run.step(batch, lr=lr, throw=throw)


def _result(number: int, reply: StepReply, total_s: float) -> StepResult:
    """Turn an engine's reply into the user's result."""
    q = len(reply.losses_plus)
    plus, minus = sum(reply.losses_plus) / q, sum(reply.losses_minus) / q
    return StepResult(
        step=number,
        loss=0.5 * (plus + minus),
        loss_plus=plus,
        loss_minus=minus,
        losses=tuple(zip(reply.losses_plus, reply.losses_minus, strict=True)),
        projected_grads=tuple(reply.projected_grads),
        coefficients=tuple(reply.coefficients),
        signal_to_noise=tuple(reply.signal_to_noise),
        status=StepStatus.OK if reply.is_finite else StepStatus.NONFINITE_LOSS,
        tokens=reply.tokens,
        prompt_tokens=reply.prompt_tokens,
        reused_tokens=reply.reused_tokens,
        forwards=reply.forwards,
        timings={"total": total_s, "weights": reply.weights_s, "score": reply.score_s},
    )
