"""What engines run of token rows: distinct sequences, and what the rows read off them."""

from __future__ import annotations

from dataclasses import dataclass

from mezo.core.rows import Rows


@dataclass(frozen=True)
class ScoredToken:
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
        prefix_adapter: the slot that the prefix runs under, see `Rows`.
        scored_tokens: what rows read off it.
    """

    tokens: tuple[int, ...]
    prefix_len: int
    prompt_len: int
    prefix_adapter: str
    scored_tokens: list[ScoredToken]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that are not scored."""
        return self.tokens[: self.prompt_len]

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that run under the prefix's adapter."""
        return self.tokens[: self.prefix_len]


def sequences_of(rows: Rows) -> list[TokenSequence]:
    """Return the distinct sequences to run, in the order of their first rows.

    A row runs without its last token, off which nothing is read. Rows that are then equal are one
    sequence: options of one token are all read off the end of their prompt.
    """
    sequences: dict[tuple[tuple[int, ...], int, int], TokenSequence] = {}
    for i, (row, prefix_len, prompt_len, is_normalised) in enumerate(
        zip(rows.tokens, rows.prefix_lens, rows.prompt_lens, rows.is_normalised, strict=True)
    ):
        key = (tuple(row[:-1]), prefix_len, prompt_len)
        sequence = sequences.setdefault(key, TokenSequence(*key, rows.prefix_adapter, []))
        sequence.scored_tokens.extend(
            ScoredToken(position, row[position + 1], i, is_normalised)
            for position in range(prompt_len - 1, len(row) - 1)
        )
    return list(sequences.values())
