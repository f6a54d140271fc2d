"""Which columns of the data mean what, by the names that people give them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mezo._inputs import require

PROMPTS = ("prompt", "query", "input", "instruction", "question", "problem")
COMPLETIONS = (
    *("completion", "response", "answer", "output", "target", "targets", "solution"),
    "solutions",
)
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic")
TEXTS = ("text", "sentence", "content", "review", "comment", "document", "article", "utterance")
# Two texts that a label is about, the one that is read first in front.
PAIRS = (
    ("premise", "hypothesis"),
    ("passage", "question"),
    ("context", "question"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
)
_SHAPES = (
    "prompt + completion, messages, text + label, text, instruction + output (Alpaca) or "
    "conversations (ShareGPT)"
)


@dataclass(frozen=True)
class Columns:
    """What the data is.

    Args:
        kind: "completion", "messages", "sharegpt", "alpaca", "label" or "text".
        names: {what it means: the data's column}.
    """

    kind: str
    names: Mapping[str, str]

    @property
    def sentence(self) -> str:
        """The columns in words."""
        words = ", ".join(f"{ours} = {theirs}" for ours, theirs in self.names.items())
        return f"data: {words} ({_WORDS[self.kind]})"


_WORDS = {
    "completion": "prompt and completion",
    "messages": "conversations",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca",
    "label": "text and label",
    "text": "language modelling",
}
_KNOWN = (
    *("prompt", "completion", "messages", "tools", "conversations", "text", "label", "system"),
    *("instruction", "input", "output", "history"),
    *(name for pair in PAIRS for name in pair),
)


def recognise(columns: Sequence[str], overrides: Mapping[str, str] | None = None) -> Columns:
    """Return what the columns of a data set mean.

    Args:
        columns: their names.
        overrides: {what it means: the data's column}, which go before what names say.

    Raises:
        ValueError: an override names no column, or the columns mean nothing that is known here.
    """
    overrides = dict(overrides or {})
    for ours, theirs in overrides.items():
        require(
            ours in _KNOWN,
            f"data: columns must give one of {_KNOWN[:8]}, got {ours!r}; write prompt=question.",
        )
        near = difflib.get_close_matches(theirs, columns, 1)
        require(
            theirs in columns,
            f"data: columns must name one of {list(columns)}, got {theirs!r} for {ours}; "
            f"{f'use {near[0]!r}' if near else 'name another'}.",
        )
    # An override takes its column away from other meanings, and its meaning from other columns.
    there = {name: name for name in columns if name not in overrides.values()} | overrides
    found = _kind(there)
    require(
        found is not None,
        f"data: columns must be {_SHAPES}, got {list(columns)}; name them with "
        "columns: prompt=THEIRS,completion=THEIRS, or give a template.",
    )
    assert found is not None
    return found


def _kind(there: Mapping[str, str]) -> Columns | None:
    """The first kind that the columns are."""
    require(
        not {"chosen", "rejected"} <= set(there),
        f"data: columns must have what is right, got preferences ({sorted(there)}); name one with "
        "columns: prompt=prompt,completion=chosen.",
    )
    for ours, kind, more in (
        ("messages", "messages", ("tools",)),
        ("conversations", "sharegpt", ("system", "tools")),
    ):
        if ours in there:
            return _columns(kind, there, ours, *more)
    if {"instruction", "output"} <= set(there):
        return _columns("alpaca", there, "instruction", "input", "output", "system", "history")
    label = _first(there, LABELS)
    completion = _first(there, COMPLETIONS)
    prompt = _first(there, PROMPTS)
    if label and not (prompt and completion):
        for pair in PAIRS:
            if set(pair) <= set(there):
                first, second = (there[name] for name in pair)
                return Columns("label", {"text": first, "second": second, "label": there[label]})
        if text := _first(there, (*TEXTS, *PROMPTS)):
            return Columns("label", {"text": there[text], "label": there[label]})
    if prompt and completion:
        require(
            label is None,
            f"data: columns must be one kind, got a label beside prompt and completion "
            f"({sorted(there)}); take one away, or name them with columns.",
        )
        return Columns("completion", {"prompt": there[prompt], "completion": there[completion]})
    if text := _first(there, TEXTS):
        return Columns("text", {"text": there[text]})
    require(
        prompt is None,
        f"data: columns must have completions or labels, got prompts only ({sorted(there)}), which "
        "are for rewards; add a column completion.",
    )
    return None


def _first(there: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in there), None)


def _columns(kind: str, there: Mapping[str, str], *names: str) -> Columns:
    return Columns(kind, {name: there[name] for name in names if name in there})
