"""What the step loop asks of an engine; the modules and packages beside this one provide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from mezo.config import MeZOConfig
from mezo.core.messages import Check, ProgressReply, StepReply, StepRequest
from mezo.core.rows import Rows, Scores
from mezo.data.encode import Invocation


class Engine(Protocol):
    """One kind of engine."""

    def why_not(self) -> str | None:
        """Return why it cannot be used here, in one sentence, or None. Starts nothing."""
        ...

    def launch(
        self,
        model: str,
        config: MeZOConfig,
        *,
        threads: int | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        max_tokens_per_forward: int | None = None,
        cache_tokens: int = 0,
        arguments: Mapping[str, Any] | None = None,
    ) -> AbstractContextManager[Any]:
        """Start it with a model, sized for a run, and end it when the context ends.

        Args:
            model: directory or hub name.
            config: the run it has to hold.
            threads: CPU hosts: threads of the engine; None: the engine's own choice.
            revision: of a hub model; None: its newest.
            dtype: the model's, as "bfloat16"; None: the engine's own choice.
            trust_remote_code: whether the model's repository may run code of its own.
            max_tokens_per_forward: bound on the tokens of one forward batch; larger steps run in
                micro-batches, with the same loss up to rounding. None: the engine's own limit.
            cache_tokens: tokens of prompts that come again and again, for a cache that has a size.
            arguments: the engine's own, by the names that it gives them.

        Returns:
            A context manager that gives the handle for `open`.

        Raises:
            ImportError: it is not installed.
            EngineError: it cannot start.
            ValueError: an argument that the engine does not have.
        """
        ...

    def open(self, handle: Any, config: MeZOConfig, tokenizer: Any) -> Session | None:
        """Attach an adapter to a handle; None if the handle is not of this kind."""
        ...


class Session(Protocol):
    """One adapter attached to one engine.

    Attributes:
        lock: one per engine; held by whoever sends it something, so that threads take turns.
        engine_name: the engine's name in `mezo.engines`.
        versions: {package: version} of what runs the model.
        model_path: where the model was loaded from, or "".
        tokenizer: a Hugging Face tokenizer, or None.
        invocation: the run's, as the tokenizer's token ids.
        max_row_tokens: the longest row that the engine can score.
        vocab_size: token ids are below it.
        dtype: the model's.
        partners: shapes of the tensors, by canonical name, that make fused projections whole and
            are not trained.
    """

    lock: AbstractContextManager[Any]
    engine_name: str
    versions: dict[str, str]
    model_path: str
    tokenizer: Any
    invocation: Invocation
    max_row_tokens: int
    vocab_size: int
    dtype: torch.dtype
    partners: dict[str, tuple[int, ...]]

    def step(self, request: StepRequest) -> StepReply:
        """Run one step on every rank and return its scalars."""
        ...

    def score(self, rows: Rows, slot: str) -> Scores:
        """Score rows under a slot: `THETA`, a perturbed one, or `BASE` for the base model."""
        ...

    def apply_updates(self, step: int, coefficients: Sequence[Sequence[float]]) -> None:
        """Take steps from ``step`` on, whose coefficients are known.

        theta <- fma(c, z, theta) over the directions of each; no c is a skipped step.
        """
        ...

    def progress(self) -> ProgressReply:
        """Return how many steps were taken, and the last one's reply.

        This is what a caller asks that was interrupted in a step.
        """
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the current fp32 adapter, whole, by canonical name."""
        ...

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put other values in the place of theta: whole tensors by canonical name, all of them.

        Raises:
            ValueError: other names or shapes, or values that are not finite; nothing has changed.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefix_lens: Sequence[int],
        slot: str,
        *,
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[str],
    ) -> list[list[int]]:
        """Continue prompts of token ids under theta or the base model.

        Args:
            prompts: N prompts, the invocation at their ends.
            prefix_lens: N numbers of leading tokens that run under the base model.
            slot: `THETA` or `BASE`.
            max_new_tokens: the most new tokens of each.
            temperature: 0 takes the likeliest token; else tokens are drawn.
            stop: texts after which a continuation may end.

        Returns:
            The new tokens of each; an end-of-sequence token or a stop text may be the last thing.
        """
        ...

    def selftest(self, rows: Rows) -> list[Check]:
        """Check what `mezo.engines.selftest` asks of an engine, on rows without prefixes."""
        ...

    def close(self) -> None:
        """Take the adapter out of the engine and give back what it holds."""
        ...
