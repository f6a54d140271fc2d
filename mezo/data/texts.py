"""What a tokenizer makes of texts and of their joints, without what it adds by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# What a text is put behind to see its tokens inside a longer one. The first one that it does not
# merge with counts; several show whether its tokens depend on what stands before it.
_CONTEXTS = ("\n", ".", ")", "1", "a", "The end")


@dataclass(frozen=True)
class Tokens:
    """A text and its tokens.

    Args:
        text: the text.
        ids: its token ids; none that the tokenizer puts before or behind every text.
        spans: of each token, the characters (begin, end) that it stands for; None where the
            tokenizer does not say.
    """

    text: str
    ids: tuple[int, ...]
    spans: Sequence[tuple[int, int]] | None

    def continues(self, head: Tokens) -> bool:
        """Whether these are the tokens of ``head``, then others, with the texts' border between.

        Blanks do not count: byte-level spans leave them out, and special tokens swallow those
        beside them.
        """
        n, border = len(head.ids), len(head.text)
        if self.ids[:n] != head.ids:
            return False
        if self.spans is None or border == 0:
            return True
        end = self.spans[n - 1][1] if n else 0
        begin = self.spans[n][0] if n < len(self.spans) else border
        return not self.text[border:end].strip() and not self.text[begin:border].strip()


class Texts:
    """The tokens of texts, by text; tokenised in one call.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.

    Raises:
        ValueError: the tokenizer does more to a text than to put tokens before and behind it.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._tokens = {t.text: t for t in tokenise(tokenizer, list(dict.fromkeys(texts)))}
        self._apart: dict[str, tuple[int, ...] | None] = {}
        # What the tokenizer puts before every text, and behind it.
        self.lead, self.tail = self._added()
        self.has_own_lead = False  # whether a text was met that begins with it

    def __getitem__(self, text: str) -> Tokens:
        return self._tokens[text]

    def with_lead(self, text: str) -> tuple[int, ...]:
        """A text's ids behind what the tokenizer puts before it, unless the text begins so."""
        ids, lead, bos = self[text].ids, self.lead, self._tokenizer.bos_token_id
        if ids[: len(lead)] == lead or (bos in lead and ids[:1] == (bos,)):
            self.has_own_lead = True
            return ids
        return lead + ids

    def apart(self, text: str) -> tuple[int, ...] | None:
        """A text's ids inside a longer one; None where it merges with all that stands before it."""
        if text not in self._apart:
            cuts = (cut for c in _CONTEXTS for cut in tokens_in_context(self._tokenizer, text, [c]))
            self._apart[text] = next(cuts, None)
        return self._apart[text]

    def _added(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and behind a text by itself."""
        if not self._tokens:
            return (), ()
        special = set(self._tokenizer.all_special_ids)
        words = (t for t in self._tokens.values() if not special.issuperset(t.ids))
        sample = next(words, None) or tokenise(self._tokenizer, ["a"])[0]
        ids, size = sample.ids, len(sample.ids)
        full = tuple(self._tokenizer(sample.text, add_special_tokens=True)["input_ids"])
        if not ids:
            return full, ()
        for start in range(len(full) - size + 1):
            if full[start : start + size] == ids:
                return full[:start], full[start + size :]
        raise ValueError(
            "Batch: the tokenizer must put its special tokens before and behind a text, got one "
            "that changes the text's own tokens with add_special_tokens=True; pass token ids."
        )


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of texts, without those that the tokenizer adds."""
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [Tokens(text, tuple(i), None) for text, i in zip(texts, ids, strict=True)]
    made = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return [
        Tokens(text, tuple(ids), spans)
        for text, ids, spans in zip(texts, made["input_ids"], made["offset_mapping"], strict=True)
    ]


def tokens_in_context(
    tokenizer: Any, text: str, contexts: Sequence[str] = _CONTEXTS
) -> list[tuple[int, ...]]:
    """The different tokens that a text has behind other texts, where it does not merge with them.

    A text on its own may have others: many tokenizers put a blank before every text.
    """
    made = tokenise(tokenizer, [t for c in contexts for t in (c, c + text)])
    cuts = (
        joint.ids[len(head.ids) :]
        for head, joint in zip(made[::2], made[1::2], strict=True)
        if joint.continues(head)
    )
    return list(dict.fromkeys(cuts))
