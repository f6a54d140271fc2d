"""Encodes batches: their texts as token rows, split where serving splits them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mezo import objectives
from mezo.core.rows import BASE, THETA, Rows
from mezo.data.batch import Batch, EncodedBatch, MadeFor
from mezo.data.checks import Text
from mezo.data.texts import Texts, Tokens, tokenise, tokens_in_context
from mezo.objectives.base import Targets

# Characters of a text that a message shows beside a border.
_SHOWN = 16


@dataclass(frozen=True)
class Invocation:
    """The tokens between every prompt and its completion.

    Args:
        text: as text, or None when it was given as token ids.
        tokens: as token ids, as they are behind a prompt; may be empty.
        prefix_mode: the run's: "activated" and "detached" split rows before these tokens.
    """

    text: str | None = ""
    tokens: tuple[int, ...] = ()
    prefix_mode: str = "exact"

    @property
    def prefix_adapter(self) -> str:
        """The slot that prefixes run under."""
        return THETA if self.prefix_mode == "detached" else BASE

    @property
    def activating_tokens(self) -> tuple[int, ...]:
        """The tokens from which an activated adapter acts; none for an ordinary one."""
        return self.tokens if self.prefix_mode == "activated" else ()

    def prefix_len(self, num_prompt_tokens: int) -> int:
        """Leading tokens of a row that run under `prefix_adapter`."""
        if self.prefix_mode == "exact":
            return 0
        # The first completion token is scored by a token that runs under the row's own adapter.
        return num_prompt_tokens if self.tokens else max(num_prompt_tokens - 1, 0)


def encode_invocation(
    invocation: str | Sequence[int] | None, tokenizer: Any, *, prefix_mode: str = "exact"
) -> Invocation:
    """Turn `MeZOConfig.invocation` into token ids; a session does so once per run.

    They are the ids that the text has behind a prompt: serving looks for them there.

    Args:
        invocation: text, token ids or None.
        tokenizer: a Hugging Face tokenizer; may be None for token ids.
        prefix_mode: the run's.

    Returns:
        The invocation.

    Raises:
        ValueError: text without a tokenizer, or text without a token; with prefix "activated" also
            text whose tokens depend on what stands before it.
    """
    if invocation is None:
        return Invocation(prefix_mode=prefix_mode)
    if not isinstance(invocation, str):
        return Invocation(None, tuple(invocation), prefix_mode)
    if tokenizer is None:
        raise ValueError(
            "MeZOConfig: invocation must be token ids where there is no tokenizer, got text; "
            "pass token ids, or attach with tokenizer=..."
        )
    found = tokens_in_context(tokenizer, invocation)
    if prefix_mode == "activated" and len(found) != 1:
        raise ValueError(
            "MeZOConfig: invocation must have the same tokens behind every prompt, got "
            f"{invocation!r}, which {'has several' if found else 'merges with what stands before'}"
            "; begin it with a blank or with a special token of the tokenizer."
        )
    tokens = found[0] if found else tokenise(tokenizer, [invocation])[0].ids
    if not tokens:
        raise ValueError(
            f"MeZOConfig: invocation must have at least one token, got {invocation!r} with none; "
            "choose words that the tokenizer knows."
        )
    return Invocation(invocation, tokens, prefix_mode)


def last_occurrence(tokens: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index at which ``pattern`` begins last in ``tokens``, or None."""
    size, wanted = len(pattern), list(pattern)
    for start in range(len(tokens) - size, -1, -1):
        if list(tokens[start : start + size]) == wanted:
            return start
    return None


def encode(
    batch: Batch,
    tokenizer: Any,
    *,
    invocation: Invocation | None = None,
    max_row_tokens: int | None = None,
    vocab_size: int | None = None,
) -> EncodedBatch:
    """Turn a batch into token rows; every split is made on token ids.

    A row of text is what serving sees, the tokens of prompt + invocation, and then the rest of the
    tokens of prompt + invocation + completion. What the tokenizer puts before every text stands
    once at its beginning; what it puts behind every text is left out. Where a token would lie
    across the completion's beginning, the completion is tokenised apart, and counted.

    Args:
        batch: N prompts.
        tokenizer: a Hugging Face tokenizer; may be None when the batch holds token ids only.
        invocation: what stands between prompt and completion.
        max_row_tokens: longest row that the engine can score, or None.
        vocab_size: token ids are below it, or None.

    Returns:
        The encoded batch.

    Raises:
        ValueError: an empty prompt or completion, a row that is too long, a token id outside the
            vocabulary, two options of a prompt with the same tokens, text without a tokenizer; with
            prefix "activated" a prompt that merges with the invocation; options of a prompt of
            which only some merge with it.
    """
    middle = invocation or Invocation()
    pairs = batch.pairs()
    texts = _texts_of(pairs, tokenizer, middle)
    rows = [_row(i, prompt, end, texts, middle) for i, (prompt, end) in enumerate(pairs)]
    for i, row in enumerate(rows):
        _check_row(i, row.tokens, row.prompt_len, max_row_tokens, vocab_size)
    _check_options(rows, batch.num_options())
    labels = None if batch.labels is None else tuple(int(x) for x in batch.labels)
    targets = Targets(
        counts=tuple(len(row.tokens) - row.prompt_len for row in rows),
        num_options=batch.num_options(),
        labels=labels,
        objective=objectives.name_for(batch.objective, has_options=batch.options is not None),
    )
    return EncodedBatch(
        Rows(
            tokens=tuple(row.tokens for row in rows),
            prefix_lens=tuple(row.prefix_len for row in rows),
            prompt_lens=tuple(row.prompt_len for row in rows),
            is_normalised=objectives.of(targets).is_normalised(targets),
            prefix_adapter=middle.prefix_adapter,
        ),
        targets,
        num_apart=sum(row.border is not None for row in rows),
        notes=_notes(rows, texts),
        made_for=MadeFor(middle.prefix_mode, middle.tokens, max_row_tokens, vocab_size),
    )


@dataclass(frozen=True)
class _Row:
    """A row; where the completion was tokenised apart, with the texts beside its beginning."""

    tokens: tuple[int, ...]
    prefix_len: int
    prompt_len: int
    border: str | None = None


def _texts_of(pairs: Sequence[tuple[Text, Text]], tokenizer: Any, middle: Invocation) -> Texts:
    """All texts whose tokens the rows need."""
    if tokenizer is not None:
        return Texts(tokenizer, (t for pair in pairs for t in _texts_of_row(*pair, middle)))
    if any(isinstance(part, str) for pair in pairs for part in pair):
        raise ValueError(
            "Batch: text needs a tokenizer, got none; pass token ids, or attach with tokenizer=..."
        )
    return Texts(None, ())


def _texts_of_row(prompt: Text, completion: Text, middle: Invocation) -> Iterator[str]:
    """The texts of one row: what serving sees, and with the completion behind it."""
    before = prompt + (middle.text or "") if isinstance(prompt, str) else None
    if before is not None:
        yield before
    if isinstance(completion, str):
        is_joint = before is not None and middle.text is not None
        yield f"{before}{completion}" if is_joint else completion


def _row(i: int, prompt: Text, completion: Text, texts: Texts, middle: Invocation) -> _Row:
    """Encode one row."""
    if not isinstance(prompt, str):
        prompt_len, before = len(prompt), (*prompt, *middle.tokens)
    elif middle.text is None:
        prompt_len, before = len(texts.with_lead(prompt)), texts.with_lead(prompt) + middle.tokens
    else:
        return _text_row(i, prompt, completion, texts, middle)
    end = texts[completion].ids if isinstance(completion, str) else tuple(completion)
    return _Row((*before, *end), middle.prefix_len(prompt_len), len(before))


def _text_row(i: int, prompt: str, completion: Text, texts: Texts, middle: Invocation) -> _Row:
    """Encode one row whose prompt and invocation are text."""
    assert middle.text is not None
    head = texts[prompt + middle.text]
    before = texts.with_lead(head.text)
    prefix_len = _prefix_len(i, prompt, head, before, middle)
    if not isinstance(completion, str):
        return _Row((*before, *completion), prefix_len, len(before))
    joint = texts[head.text + completion]
    tokens = texts.with_lead(joint.text)
    if joint.continues(head) and tokens[: len(before)] == before:
        return _Row(tokens, prefix_len, len(before))
    border = f"{head.text[-_SHOWN:]!r} | {completion[:_SHOWN]!r}"
    end = texts.apart(completion) if joint.spans is not None else None
    if end is None:
        raise ValueError(
            f"Batch: the completion of row {i} must begin at a token's beginning, got {border}, "
            "which the tokenizer joins; begin completions with a blank and end prompts without one."
        )
    return _Row(before + end, prefix_len, len(before), border)


def _prefix_len(
    i: int, prompt: str, head: Tokens, before: tuple[int, ...], middle: Invocation
) -> int:
    """Where a row of text is split for its prefix; ``before`` are the tokens of ``head``."""
    assert middle.text is not None
    size = len(middle.tokens)
    if middle.prefix_mode == "exact" or size == 0:
        return middle.prefix_len(len(before))
    if head.ids[-size:] == middle.tokens:
        return len(before) - size
    if middle.prefix_mode == "activated" or head.spans is None:
        raise ValueError(
            f"Batch: prompt and invocation of row {i} must end with the invocation's tokens, or an "
            "activated adapter would not act and the base model would answer, got other tokens for "
            f"{prompt[-_SHOWN:]!r} | {middle.text[:_SHOWN]!r}; begin the invocation with a special "
            "token of the tokenizer, or with a blank where prompts end without one, and leave line "
            "breaks to the prompts."
        )
    # A token that lies across the invocation's beginning runs under the row's own adapter.
    inside = sum(end <= len(prompt) for _, end in head.spans)
    return max(min(len(before) - len(head.ids) + inside, len(before) - 1), 0)


def _notes(rows: Sequence[_Row], texts: Texts) -> dict[str, str]:
    """What a run says once about these texts."""
    notes = {}
    if border := next((row.border for row in rows if row.border is not None), None):
        notes["apart"] = (
            f"a completion should begin at a token's beginning, got {border}, which the tokenizer "
            "joins; such rows (counted in run.num_apart) are the tokens of the prompt as it is "
            "served, then those of the completion apart; begin completions with a blank and end "
            "prompts without one"
        )
    if texts.has_own_lead and texts.lead:
        notes["lead"] = (
            "texts begin with what the tokenizer puts before every text (a rendered chat prompt "
            "has its bos); rows have it once, but SGLang puts another before a text prompt; send "
            "token ids, or the text without it"
        )
    if texts.tail:
        notes["tail"] = (
            f"the tokenizer puts the tokens {list(texts.tail)} behind every text; rows leave them "
            "out, requests with a text prompt have them; send token ids, or use a tokenizer with "
            "add_eos_token=False"
        )
    return notes


def _check_row(
    i: int,
    row: tuple[int, ...],
    prompt_len: int,
    max_row_tokens: int | None,
    vocab_size: int | None,
) -> None:
    """Raise for a row that cannot be scored."""
    if prompt_len == 0:
        raise ValueError(
            f"Batch: row {i} must have at least one prompt token, got an empty prompt; "
            "begin it with the tokenizer's bos token."
        )
    if len(row) == prompt_len:
        raise ValueError(
            f"Batch: row {i} must have at least one completion token, got none; "
            "drop the row or give it a completion."
        )
    if max_row_tokens is not None and len(row) > max_row_tokens:
        raise ValueError(
            f"Batch: row {i} must have at most {max_row_tokens} tokens (the engine's limit), "
            f"got {len(row)}; shorten the prompt or start the engine with a larger limit."
        )
    if min(row) < 0 or (vocab_size is not None and max(row) >= vocab_size):
        raise ValueError(
            f"Batch: token ids of row {i} must lie in the model's vocabulary of {vocab_size}, "
            f"got {min(row)}..{max(row)}; encode the text with the model's own tokenizer."
        )


def _check_options(rows: Sequence[_Row], num_options: tuple[int, ...] | None) -> None:
    """Raise when options of a prompt are one token row, or are not all tokenised alike."""
    start = 0
    for i, size in enumerate(num_options or ()):
        options = rows[start : start + size]
        # One row could never be told from the other.
        if len({row.tokens for row in options}) < size:
            raise ValueError(
                f"Batch: options of prompt {i} must have different tokens, got one twice; "
                "choose words that the tokenizer knows."
            )
        apart = [row.border for row in options if row.border is not None]
        if 0 < len(apart) < size:
            raise ValueError(
                f"Batch: options of prompt {i} must all begin at a token's beginning, got "
                f"{apart[0]}, which the tokenizer joins, and others that it does not; begin "
                "options with a blank and end prompts without one."
            )
        start += size
