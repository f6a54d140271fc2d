"""The examples of a training as token rows, made once and before there is an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mezo.checkpoint.identity import rows_identity
from mezo.config import MeZOConfig
from mezo.data.batch import EncodedBatch
from mezo.data.encode import encode, encode_invocation
from mezo.data.example import Example, batch_of
from mezo.run import Run
from mezo.train.examples import TrainingExamples


@dataclass(frozen=True)
class EncodedExamples:
    """What a training trains and reports on, as token rows.

    Args:
        train: the training examples; None where they are streamed.
        held_out: those of evaluations while training; None: there are none.
        test: those of the report; None: the held-out ones.
    """

    train: EncodedBatch | None
    held_out: EncodedBatch | None
    test: EncodedBatch | None

    @classmethod
    def of(cls, examples: TrainingExamples, tokenizer: Any, config: MeZOConfig) -> EncodedExamples:
        """Tokenise examples without knowing an engine's limits; see `checked`.

        A large file takes seconds, which an engine need not wait for.

        Raises:
            ValueError: an example that is none; the sentence says where it is from.
        """
        middle = encode_invocation(config.invocation, tokenizer, prefix_mode=config.prefix)

        def tokenised(some: Iterable[Example]) -> EncodedBatch | None:
            if not isinstance(some, Sequence) or not some:
                return None
            return _located(
                lambda few: encode(batch_of(few), tokenizer, invocation=middle),
                some,
                "be made of tokens",
                "change the row, or its wording",
            )

        is_apart = examples.test is not examples.held_out
        return cls(
            tokenised(examples.train),
            tokenised(examples.held_out),
            tokenised(examples.test) if is_apart else None,
        )

    def identity(self) -> dict[str, str]:
        """What tells the training examples from others; nothing where they are streamed."""
        if self.train is None:
            return {}
        rows, targets = self.train.rows, self.train.targets
        parts = (rows.tokens, rows.prefix_lens, rows.prompt_lens, targets.labels or ())
        return {"rows_sha256": rows_identity(part for some in parts for part in some)}

    def prompt_tokens(self) -> int:
        """Tokens of all prompts that differ, which come again in each epoch and evaluation."""
        found = (self.train, self.held_out, self.test)
        return sum(map(len, set().union(*(batch.prompts() for batch in found if batch))))


def checked(run: Run, encoded: EncodedBatch, examples: Sequence[Example]) -> EncodedBatch:
    """Rows that were tokenised before there was a run, as the run's own.

    Raises:
        ValueError: an example that the engine cannot score; the sentence says where it is from.
    """
    try:
        run.encode(encoded)
    except ValueError:
        return encode_all(run, examples)  # which says where a row is from that does not fit
    run.note(encoded)
    return encoded


def encode_all(run: Run, examples: Sequence[Example]) -> EncodedBatch:
    """Tokenise examples as one batch, to be cut with `EncodedBatch.select`.

    Raises:
        ValueError: an example that the engine cannot score; the sentence says where it is from.
    """
    fits = "fit the engine", "set max_length or max_prompt_tokens"
    return _located(lambda some: run.encode(batch_of(some)), examples, *fits)


def batches_of(
    run: Run, examples: Sequence[Example], size: int, encoded: EncodedBatch | None = None
) -> list[EncodedBatch]:
    """Cut examples into batches of at most ``size``.

    Args:
        run: the run.
        examples: the examples.
        size: of a batch.
        encoded: the same as token rows, where they have been tokenised before.

    Raises:
        ValueError: an example that the engine cannot score; the sentence says where it is from.
    """
    if not examples:
        return []
    whole = encode_all(run, examples) if encoded is None else checked(run, encoded, examples)
    return [
        whole.select(range(i, min(i + size, len(examples)))) for i in range(0, len(examples), size)
    ]


def streamed(run: Run, examples: Iterable[Example], size: int) -> Iterator[EncodedBatch]:
    """Batches of examples as they come."""
    stream = iter(examples)
    while len(chunk := list(islice(stream, size))) == size:
        yield encode_all(run, chunk)


def _located(
    encoded: Callable[[Sequence[Example]], EncodedBatch],
    examples: Sequence[Example],
    expected: str,
    remedy: str,
) -> EncodedBatch:
    """Encode examples; the one that cannot be is named by where it is from."""
    try:
        return encoded(examples)
    except ValueError:
        for example in examples:
            try:
                encoded([example])
            except ValueError as error:
                origin = example.where or f"the text begins {str(example.prompt)[:40]!r}"
                raise ValueError(
                    f"train: every example must {expected}, got {error} ({origin}); {remedy}."
                ) from error
        raise
