"""What engines run of token rows: distinct sequences, and what the rows read off them."""

from __future__ import annotations

from dataclasses import dataclass

from mezo.data import Rows


@dataclass(frozen=True)
class Reading:
    """The log-likelihood of a token, read off a sequence and added to a row's sum.

    Args:
        position: of the token before it, whose logits hold it.
        token: token id.
        row: whose sum it is part of.
        is_normalised: whether it has to be one, see `Rows`.
    """

    position: int
    token: int
    row: int
    is_normalised: bool


@dataclass(frozen=True)
class TokenSequence:
    """Tokens to run once for each adapter.

    Args:
        tokens: token ids.
        prefix_len: leading tokens that run under the prefix's adapter, else 0.
        prompt_len: leading tokens that are not scored.
        readings: what rows read off it.
    """

    tokens: tuple[int, ...]
    prefix_len: int
    prompt_len: int
    readings: list[Reading]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that are not scored; all of them where single tokens follow."""
        return self.tokens[: self.prompt_len]


def sequences_of(rows: Rows) -> list[TokenSequence]:
    """Return the distinct sequences to run, in the order of their first rows.

    Rows that are one prompt with different single tokens behind it are one sequence, the prompt:
    the logits behind its last token hold them all. Any other row is a sequence of its own.
    """
    sequences: dict[tuple[tuple[int, ...], int, int | None], TokenSequence] = {}
    for i, (row, prefix_len, prompt_len, is_normalised) in enumerate(
        zip(rows.tokens, rows.prefix_lens, rows.prompt_lens, rows.is_normalised, strict=True)
    ):
        is_shared = len(row) - prompt_len == 1
        tokens = tuple(row[:prompt_len] if is_shared else row)
        key = (tokens, prefix_len, None if is_shared else i)
        sequence = sequences.setdefault(key, TokenSequence(tokens, prefix_len, prompt_len, []))
        sequence.readings.extend(
            Reading(position, row[position + 1], i, is_normalised)
            for position in range(prompt_len - 1, len(row) - 1)
        )
    return list(sequences.values())
