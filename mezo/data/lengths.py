"""Examples of a bounded number of tokens: prompts lose their beginnings, completions nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mezo._inputs import require
from mezo.data.encode import Invocation, encode
from mezo.data.example import Example, batch_of

_ADDED = 8  # tokens that a tokenizer may put around texts


def shortened(
    example: Example, tokenizer: Any, invocation: Invocation, max_length: int | None
) -> Example:
    """Return an example of at most ``max_length`` tokens: the prompt loses its beginning.

    Args:
        example: the example; it is returned as it is where it is short enough.
        tokenizer: the model's.
        invocation: the run's; its tokens count.
        max_length: tokens of the longest row; None: any number.

    Raises:
        ValueError: what is behind the prompt leaves no room for it.
    """
    if max_length is None or _is_short(example, max_length - len(invocation.tokens)):
        return example
    # As token ids, where they are split is where the whole text is split.
    made = encode(batch_of([example]), tokenizer, invocation=invocation).rows
    size = len(invocation.tokens)
    before = made.tokens[0][: made.prompt_lens[0] - size]
    ends = [row[length:] for row, length in zip(made.tokens, made.prompt_lens, strict=True)]
    tail = size + max(map(len, ends))
    over = len(before) + tail - max_length
    if over <= 0:
        return example
    lead = 1 if before[:1] == (tokenizer.bos_token_id,) else 0
    require(
        len(before) - over > lead,
        f"a row must leave room for its prompt in max_length {max_length}, got {tail} tokens "
        "behind it",
    )
    prompt = before[:lead] + before[lead + over :]
    if example.options is None:
        return replace(example, prompt=prompt, completion=ends[0])
    return replace(example, prompt=prompt, options=tuple(ends))


def _is_short(example: Example, limit: int) -> bool:
    """Whether an example has at most ``limit`` tokens, told without tokenising it.

    No token of plain letters is shorter than one letter.
    """
    ends = example.options or (example.completion or "",)
    parts = [example.prompt, *ends]
    if any(isinstance(part, str) and not part.isascii() for part in parts):
        return False
    return len(example.prompt) + max(map(len, ends)) + _ADDED <= limit


def short_enough(examples: Sequence[Example], tokenizer: Any, limit: int | None) -> list[Example]:
    """Return the examples whose prompts have at most ``limit`` tokens; all for None."""
    if limit is None:
        return list(examples)
    texts = [e.prompt for e in examples if isinstance(e.prompt, str)]
    lengths = iter(tokenizer(texts)["input_ids"] if texts else [])
    return [
        e
        for e in examples
        if len(next(lengths) if isinstance(e.prompt, str) else e.prompt) <= limit
    ]
