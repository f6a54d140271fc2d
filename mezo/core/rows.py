"""What engines score and what they return: token rows, adapter slots by name, sums."""

from __future__ import annotations

from dataclasses import dataclass

# Names of adapter slots: theta itself, and no adapter at all. The others are made below.
THETA = "theta"
BASE = "base"


def plus_slot(direction: int) -> str:
    """The name of the slot that holds theta + eps z of a direction."""
    return f"plus{direction}"


def minus_slot(direction: int) -> str:
    """The name of the slot that holds theta - eps z of a direction."""
    return f"minus{direction}"


def pair_slots(num_directions: int) -> list[str]:
    """The names of the perturbed slots, all plus first: plus0, plus1, ..., minus0, minus1, ..."""
    return [name(k) for name in (plus_slot, minus_slot) for k in range(num_directions)]


def run_slots(num_directions: int) -> list[str]:
    """The names of all slots of a run: theta, then the perturbed ones."""
    return [THETA, *pair_slots(num_directions)]


@dataclass(frozen=True)
class Rows:
    """Token rows as engines score them.

    Args:
        tokens: R rows of token ids: prompt, invocation, completion.
        prefix_lens: R numbers of leading tokens that run under the prefix's adapter, else 0.
        prompt_lens: R numbers of leading tokens that are not scored, >= 1 and >= prefix_lens.
        is_normalised: R flags: False where the loss compares a row only with rows of the same
            prompt and, like it, of one completion token. Their normaliser cancels, so that an
            engine may return the token's logit in place of its log-likelihood.
        prefix_adapter: the slot that prefixes run under: `BASE` (activated) or `THETA` (detached).
    """

    tokens: tuple[tuple[int, ...], ...]
    prefix_lens: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    is_normalised: tuple[bool, ...]
    prefix_adapter: str = BASE

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Scores:
    """What an engine's forward returns: one number per row and slot, and what it cost.

    Args:
        logprob_sums: {slot: R sums of completion-token log-likelihoods, nats; a logit where
            `Rows.is_normalised` says that it will do}.
        tokens: tokens the engine computed, by its own count, prompts included.
        forwards: forward batches it ran.
        prompt_tokens: of ``tokens``, those computed on the base model for a shared prompt.
        reused_tokens: prompt tokens that rows got from the cache instead of computing them.
    """

    logprob_sums: dict[str, list[float]]
    tokens: int
    forwards: int
    prompt_tokens: int = 0
    reused_tokens: int = 0
