"""How continuations are made of prompts: the arguments of `Run.generate`, for any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mezo._inputs import as_list, checked_integer, checked_number, require, shown
from mezo.core.rows import BASE, Rows
from mezo.data.batch import Batch
from mezo.data.checks import Text, texts

if TYPE_CHECKING:
    from mezo.engines.base import Session


MAX_NEW_TOKENS = 64
TEMPERATURE = 0.0  # the likeliest token


@dataclass(frozen=True)
class Sampling:
    """How to continue prompts; made by `checked`.

    Args:
        max_new_tokens: the most new tokens of each.
        temperature: 0 takes the likeliest token; else tokens are drawn.
        stop: texts at which a continuation ends.
        tokenizer: a Hugging Face tokenizer.
    """

    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...]
    tokenizer: Any

    @classmethod
    def checked(cls, max_new_tokens: Any, temperature: Any, stop: Any, tokenizer: Any) -> Sampling:
        """Return it as plain Python, or raise ValueError."""
        require(
            tokenizer is not None,
            "generate: there must be a tokenizer to make texts with, got none; attach with "
            "tokenizer=...",
        )
        stops = [stop] if isinstance(stop, str) else as_list(stop)
        require(
            stops is not None and all(isinstance(text, str) and text for text in stops),
            f"generate: stop must be a list of texts, got {shown(stop)}; pass ['\\n'], or leave it "
            "out.",
        )
        low, warm = "an integer >= 1", "a finite number >= 0"
        return cls(
            checked_integer("generate: max_new_tokens", max_new_tokens, 1, None, low, "use 64"),
            checked_number(
                "generate: temperature", temperature, lambda t: t >= 0, warm, "use 0 or 0.7"
            ),
            tuple(stops or ()),
            tokenizer,
        )

    def batch(self, prompts: Sequence[Text]) -> Batch:
        """The rows that training would make, for the limits and the split of the longest ones.

        Their completions are stand-ins.
        """
        checked = texts("prompts", prompts)
        return Batch(prompts=checked, completions=[[0] * self.max_new_tokens] * len(checked))

    def texts(self, session: Session, rows: Rows, slot: str) -> list[str]:
        """Have an engine continue what stands before the rows' completions.

        Args:
            session: the run's.
            rows: of `batch`, encoded.
            slot: `THETA` or `BASE`.

        Returns:
            The continuations without special tokens, up to the first stop text.
        """
        # A detached prefix is an approximation for steps; serving has theta for all tokens.
        is_split = slot != BASE and rows.prefix_adapter == BASE
        made = session.generate(
            [ids[:size] for ids, size in zip(rows.tokens, rows.prompt_lens, strict=True)],
            rows.prefix_lens if is_split else [0] * len(rows),
            slot,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop=self.stop,
        )
        return [self._cut(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]

    def _cut(self, text: str) -> str:
        """A text up to the first stop text in it."""
        return text[: min((text.index(s) for s in self.stop if s in text), default=len(text))]
