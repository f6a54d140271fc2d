"""`attach`, `step` and `Run`: the loop's view of an adapter in an engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mezo._arguments import (
    checked_config,
    checked_eps,
    checked_lr,
    checked_offset,
    checked_path,
    checked_tokenizer,
    checked_updates,
)
from mezo._inputs import require, shown
from mezo.checkpoint.peft import save_peft
from mezo.config import MeZOConfig
from mezo.core.messages import StepRequest
from mezo.core.rows import BASE, THETA
from mezo.data.batch import Batch, EncodedBatch, MadeFor
from mezo.data.checks import Text
from mezo.data.encode import encode
from mezo.engines import open_session
from mezo.engines.sampling import MAX_NEW_TOKENS, TEMPERATURE, Sampling
from mezo.engines.selftest import require_passed
from mezo.results import EvalResult, StepResult, StepWatch, evaluation, raise_for

if TYPE_CHECKING:
    from mezo.engines.base import Session

logger = logging.getLogger(__name__)


class Run:
    """An adapter being trained in an engine. Made by `attach`; also a context manager.

    Attributes:
        name: the adapter's name; SGLang serves it under ``lora_path=run.name``.
        config: the run's `MeZOConfig`.
        steps: steps taken so far; the next step's number.
        last_result: of the last step taken by `step`, also where that call was interrupted before
            it could return it; None before the first.
        session: the engine's side.
        invocation: the tokens between every prompt and its completion.
        num_apart: rows so far whose completion was tokenised apart from its prompt, because the
            tokenizer joins their borders; the first one is logged as a warning.
    """

    def __init__(self, session: Session, config: MeZOConfig) -> None:
        self.session = session
        self.config = config
        self.name = config.name
        self.steps = 0
        self.invocation = session.invocation
        self.num_apart = 0
        self._noted: set[str] = set()
        self._is_closed = False
        self.last_result: StepResult | None = None
        self._is_unsure = False  # of whether the last step was taken
        self._watch = StepWatch(config.name)
        if config.prefix == "detached":
            logger.warning(
                "run %r: prefix 'detached' is an approximation, it drops the prompt's part of the "
                "derivative; mezo.prefix_bias(run, batches) measures by how much",
                config.name,
            )

    def encode(self, batch: Batch | EncodedBatch) -> EncodedBatch:
        """Turn a batch into token rows, checking it against the engine's limits."""
        if isinstance(batch, EncodedBatch):
            limits = self.session.max_row_tokens, self.session.vocab_size
            batch.check_made_for(MadeFor(self.config.prefix, self.invocation.tokens, *limits))
            return batch
        require(
            isinstance(batch, Batch),
            f"run: batch must be a mezo.Batch, got {shown(batch)}; make one with "
            "mezo.Batch(prompts=..., completions=...) or options and labels.",
        )
        encoded = encode(
            batch,
            self.session.tokenizer,
            invocation=self.invocation,
            max_row_tokens=self.session.max_row_tokens,
            vocab_size=self.session.vocab_size,
        )
        self.note(encoded)
        return encoded

    def note(self, encoded: EncodedBatch) -> None:
        """Count rows that were encoded apart, and say once what there is to say about texts."""
        self.num_apart += encoded.num_apart
        for kind, sentence in encoded.notes.items():
            if kind not in self._noted:
                self._noted.add(kind)
                logger.warning("run %r: %s", self.name, sentence)

    def step(
        self, batch: Batch | EncodedBatch, *, lr: float | None = None, throw: bool = False
    ) -> StepResult:
        """Take one step; see `mezo.step`."""
        started = time.perf_counter()
        rate = self.config.lr if lr is None else checked_lr(lr)
        encoded = self.encode(batch)
        with self._ready():
            number = self.steps
            with self._numbered():
                reply = self.session.step(self.request(encoded, lr=rate))
                result = StepResult.of(number, reply, total_s=time.perf_counter() - started)
                self.last_result = result
        self._watch(result, eps=self.config.eps, dtype=reply.slot_dtype)
        if throw:
            raise_for(result)
        return result

    def sync(self) -> StepResult | None:
        """Find out whether a step that was interrupted was taken; every other call does so first.

        A step that raised (an interrupt, a lost connection) may still have been taken: the
        engine is asked, and `steps` counts it then. It is not taken again.

        Returns:
            The result of the interrupted step if it was taken, else (and for updates) None.
        """
        with self.session.lock:
            self._check_open()
            if not self._is_unsure:
                return None
            progress = self.session.progress()
            number, late = self.steps, None
            if progress.steps != number and progress.last is not None:
                total_s = progress.last.weights_s + progress.last.score_s
                late = self.last_result = StepResult.of(number, progress.last, total_s=total_s)
            self.steps = progress.steps
            self._is_unsure = False
        if progress.steps == number:
            return None
        logger.warning(
            "run %r: step %d was interrupted, but the engine has taken it; the next one is %d",
            self.name,
            number,
            progress.steps,
        )
        return late

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
        """`pair_losses` of the step ``offset`` behind the next one."""
        started = time.perf_counter()
        scale = self.config.eps if eps is None else checked_eps(eps)
        encoded = self.encode(batch)
        with self._ready():
            number = self.steps + checked_offset(offset, self.steps)
            reply = self.session.step(self.request(encoded, step=number, eps=scale))
        result = StepResult.of(number, reply, total_s=time.perf_counter() - started)
        self._watch(result, eps=scale, dtype=reply.slot_dtype)
        return result

    def evaluate(self, batch: Batch | EncodedBatch, *, base: bool = False) -> EvalResult:
        """Score a batch under the current adapter, or under the base model without it."""
        encoded = self.encode(batch)
        slot = BASE if base else THETA
        with self._ready():
            scores = self.session.score(encoded.rows, slot)
        return evaluation(encoded.targets, scores.logprob_sums[slot], scores.tokens)

    def apply_update(self, coefficients: Sequence[float]) -> None:
        """Take a step whose coefficients are known already, as replay does.

        ``coefficients``: one per direction; an empty list is a skipped step.
        """
        self.apply_updates([coefficients])

    def apply_updates(self, coefficients: Sequence[Sequence[float]]) -> None:
        """`apply_update` for several steps, in one pass over the weights."""
        numbers = checked_updates(coefficients, self.config.num_directions)
        with self._ready(), self._numbered(len(numbers)):
            self.session.apply_updates(self.steps, numbers)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the current adapter, {canonical name: fp32 tensor on the CPU}."""
        with self._ready():
            return self.session.weights()

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the current weights by others of this run's kind (ValueError); `steps` stays."""
        with self._ready():
            self.session.set_weights(weights)

    def generate(
        self,
        prompts: Sequence[Text],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = TEMPERATURE,
        stop: Sequence[str] = (),
        base: bool = False,
    ) -> list[str]:
        """Return what continues prompts, the run's invocation behind each; no special tokens.

        Args:
            prompts: texts or token ids, without the invocation.
            max_new_tokens: the most new tokens of each.
            temperature: 0 takes the likeliest token; else the engine draws.
            stop: texts at which a continuation ends; they are cut off.
            base: whether to use the base model without the adapter.

        Raises:
            ValueError: a bad argument, no tokenizer, or a prompt that is too long.
            NotImplementedError: an SGLang engine that cannot serve the run.
        """
        how = Sampling.checked(max_new_tokens, temperature, stop, self.session.tokenizer)
        rows, slot = self.encode(how.batch(prompts)).rows, BASE if base else THETA
        with self._ready():
            return how.texts(self.session, rows, slot)

    def save(self, directory: str | Path) -> Path:
        """Write the current adapter as PEFT's; see `mezo.checkpoint.peft.save_peft`."""
        return save_peft(
            self.weights(),
            self.config,
            checked_path("save: directory", directory),
            base_model=self.session.model_path or None,
            alora_invocation_tokens=self.invocation.activating_tokens or None,
            partners=self.session.partners,
        )

    def close(self) -> None:
        """Take the adapter out of the engine. Unsaved weights are gone; closing twice is fine.

        Raises:
            RuntimeError: requests for the run are in this thread's event loop; it is still open.
        """
        with self.session.lock:
            if self._is_closed:
                return
            self._is_closed = True
        # Without the lock: this may wait for requests, in an event loop that waits for the lock.
        try:
            self.session.close()
        except BaseException:
            self._is_closed = False
            raise

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
            targets=encoded.targets,
            eps=self.config.eps if eps is None else eps,
            lr=lr,
            clip=self.config.clip,
            estimator=self.config.estimator,
            optimizer=self.config.optimizer,
        )

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Have the engine to ourselves, the run open, and `steps` right."""
        with self.session.lock:
            self.sync()
            yield

    @contextmanager
    def _numbered(self, count: int = 1) -> Iterator[None]:
        """Count steps; those that raise may have been taken, which `sync` finds out."""
        self._is_unsure = True
        yield
        self.steps += count
        self._is_unsure = False

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(
                f"run {self.name!r} must be open, got a closed one; attach the engine again."
            )


def attach(
    engine: Any,
    config: MeZOConfig | None = None,
    *,
    tokenizer: Any = None,
    selftest: bool | None = None,
) -> Run:
    """Put a fresh LoRA adapter into an engine, ready to be trained.

    Args:
        engine: an ``sglang.Engine`` started with ``enable_lora=True`` (see `mezo.launch_engine`),
            or a Hugging Face causal language model.
        config: the adapter and the estimator; default ``MeZOConfig()``.
        tokenizer: the model's tokenizer, for batches that hold text. A Hugging Face model needs
            one; an SGLang engine has its own unless it was started with skip_tokenizer_init, and
            takes this one instead.
        selftest: None proves in the engine, with a few short forwards, that the adapter is applied,
            that slots are read as written, that L(theta, theta) is 0 to the bit, that nothing else
            moves and that no stale KV is served. True compares a batch with the checkpoint in
            transformers, too, where that fits into memory, and warns of a difference. False: none.

    Returns:
        The run.

    Raises:
        ValueError: the engine's LoRA pool is too small for the adapter (rank, modules, slots).
        NotImplementedError: the engine runs in a mode that MeZO does not support.
        RuntimeError: the mezo plugin is not loaded in the engine's scheduler processes; or the
            self-test failed, and the adapter has been taken out again.
        TypeError: ``engine`` is neither of the two, or ``config`` or ``tokenizer`` is none.
    """
    config = checked_config("attach", config)
    checked_tokenizer(tokenizer)
    require(
        selftest is None or isinstance(selftest, bool),
        f"attach: selftest must be None, True or False, got {shown(selftest)}; leave it out.",
    )
    session = open_session(engine, config, tokenizer)
    try:
        run = Run(session, config)
        if selftest is not False:
            require_passed(run)
        if selftest:
            from mezo.diagnostics.comparison import warn_of_difference  # holds runs itself

            warn_of_difference(run)
    except BaseException:
        session.close()  # or the engine would keep an adapter that nobody holds
        raise
    return run


def checked_run(what: str, run: Any) -> Run:
    """Return ``run``, or raise TypeError where it is none."""
    if not isinstance(run, Run):
        raise TypeError(
            f"{what}: run must be a mezo.Run, got {shown(run)}; make one with mezo.attach(engine)."
        )
    return run


def step(
    run: Run, batch: Batch | EncodedBatch, *, lr: float | None = None, throw: bool = False
) -> StepResult:
    """Take one MeZO step: two losses of one batch, then a step along z.

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps);   theta <- theta - lr g z

    Args:
        run: from `attach`.
        batch: what to train on.
        lr: learning rate of this step, default ``run.config.lr``.
        throw: raise instead of returning a result whose status is not OK. The step has ended by
            then, as its status says: only one with a non-finite loss left the weights alone.

    Returns:
        The losses, the projected gradients and what they cost. The update is fused with the next
        step's perturbation; everything that reads the weights sees it applied.

    Raises:
        ValueError: a bad batch; nothing has changed then.
        NonfiniteLossError: a loss or its update is not finite; see ``throw``.
        StepError: any other status that is not OK; see ``throw``. It has the result.

    Numerics: losses from fp32 log-likelihoods, summed in float64; theta in fp32. A run is a
        function of (seed, batches), and theta of (seed, coefficients), bit for bit.
    Source: Malladi et al. 2023 (arXiv 2305.17333), Algorithm 1.
    """
    return checked_run("step", run).step(batch, lr=lr, throw=throw)
