"""The fields of a `Batch` as plain Python, and what is wrong with them in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mezo._inputs import as_list, number, plain, shown

Text = str | Sequence[int]


def listed(field: str, values: Any) -> list[Any]:
    """The entries of a field that must be a list."""
    entries = as_list(values)
    if entries is None:
        what = "one text" if isinstance(plain(values), str) else shown(values)
        raise ValueError(
            f"Batch: {field} must be a list with an entry for each prompt or option, got {what}; "
            f"{_remedy(values) or 'put it into a list'}."
        )
    return entries


def texts(field: str, values: Any) -> list[Text]:
    """A field's entries, each a text or a list of token ids."""
    return [_text(f"{field}[{i}]", value) for i, value in enumerate(listed(field, values))]


def option_lists(values: Any) -> list[Text] | list[list[Text]]:
    """The options shared by all prompts, or a list of them for each prompt."""
    entries = [plain(value) for value in listed("options", values)]
    entries = [value if isinstance(value, str) else as_list(value) or value for value in entries]
    if not any(is_option_list(value) for value in entries):
        return texts("options", entries)
    for i, value in enumerate(entries):
        if not isinstance(value, list) or (value and not is_option_list(value)):
            raise ValueError(
                f"Batch: options[{i}] must be a list of options as the others are, got "
                f"{shown(value)}; pass one list for all prompts or a list for each."
            )
    return [texts(f"options[{i}]", value) for i, value in enumerate(entries)]


def is_option_list(value: Any) -> bool:
    """Whether an entry of options is a list of options, not a text or a list of token ids."""
    if not isinstance(value, list) or not value:
        return False
    return isinstance(value[0], str) or as_list(value[0]) is not None


def _text(where: str, value: Any) -> Text:
    """A text, or a list of token ids, of which there may be none."""
    if isinstance(value, str):
        return str(value)
    ids = None if isinstance(value, (bytes, bytearray, memoryview)) else as_list(value)
    if ids is None:
        raise ValueError(
            f"Batch: {where} must be text or a list of token ids, got {shown(value)}; "
            f"{_remedy(value) or 'drop the example or fill it in'}."
        )
    for j, token in enumerate(ids):
        if type(token) is int and token >= 0:  # nearly all are
            continue
        found = number(token)
        if not isinstance(found, int) or found < 0:
            raise ValueError(
                f"Batch: {where}[{j}] must be a token id, an integer >= 0, got {shown(token)}; "
                f"{_remedy(token) or 'pass one text, or the ids that the tokenizer gives'}."
            )
        ids[j] = found
    return ids


def _remedy(value: Any) -> str | None:
    """What to do about a value that another library accepts here; None for other values."""
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        keys = set(value.keys())
        if {"role", "content"} <= keys:
            return (
                "render chat messages to one text with "
                "tokenizer.apply_chat_template(messages, tokenize=False)"
            )
        if "input_ids" in keys:
            return "pass its 'input_ids'"
        return "pass the column or the list of its texts"
    return None


def label_of(i: int, value: Any, size: int) -> int:
    """A label as the index of one of ``size`` options."""
    found = number(value)
    if isinstance(plain(value), bool):
        found = int(value)
    if found is None or (isinstance(found, float) and not found.is_integer()):
        raise ValueError(
            f"Batch: labels[{i}] must be the index of the right option, an integer, got "
            f"{shown(value)}; pass an index in 0..{size - 1}."
        )
    if not 0 <= found < size:
        raise ValueError(
            f"Batch: labels[{i}] must name one of the {size} options, got {shown(value)}; "
            f"pass an index in 0..{size - 1}."
        )
    return int(found)
