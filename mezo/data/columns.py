"""Which columns of the data mean what, by the names that people give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mezo._inputs import nearest, require

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
        unused: the data's other columns.
    """

    kind: str
    names: Mapping[str, str]
    unused: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The columns in words."""
        words = ", ".join(f"{ours} = {theirs}" for ours, theirs in self.names.items())
        more = f", not used: {', '.join(self.unused)}" if self.unused else ""
        return f"data: {words} ({_WORDS[self.kind]}{more})"


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
        near = nearest(theirs, columns)
        require(
            theirs in columns,
            f"data: columns must name one of {list(columns)}, got {theirs!r} for {ours}; "
            f"{f'use {near!r}' if near else 'name another'}.",
        )
    # Complete overrides are all there is. An override takes its column away from other meanings,
    # and its meaning from other columns; else names count in small letters.
    named = {name.strip().lower(): name for name in reversed(columns)}
    there = {k: name for k, name in named.items() if name not in overrides.values()} | overrides
    found = (_is_complete(overrides) and _kind(overrides)) or _kind(there)
    require(
        bool(found),
        f"data: columns must be {_SHAPES}, got {list(columns)}; name them with "
        "columns: prompt=THEIRS,completion=THEIRS, or give a template.",
    )
    assert found
    used = found.names.values()
    return replace(found, unused=tuple(name for name in columns if name not in used))


def _is_complete(given: Mapping[str, str]) -> bool:
    """Whether columns that were named are a kind without any other column."""
    if "label" in given:
        return any(set(texts) <= set(given) for texts in (*PAIRS, ("text",)))
    return any(
        set(kind) <= set(given)
        for kind in (
            ("messages",),
            ("conversations",),
            ("prompt", "completion"),
            ("instruction", "output"),
        )
    )


def _kind(there: Mapping[str, str]) -> Columns | None:
    """The first kind that the columns are."""
    require(
        not {"chosen", "rejected"} <= set(there),
        "data: columns must have what is right, got preferences "
        f"({sorted(there.values())}); name one with columns: prompt=prompt,completion=chosen.",
    )
    for ours, kind, more in (
        ("messages", "messages", ("tools",)),
        ("conversations", "sharegpt", ("system", "tools")),
    ):
        if ours in there:
            return _columns(kind, there, ours, *more)
    if {"instruction", "input"} <= set(there) and (output := _one(there, COMPLETIONS)):
        there = {**there, "output": there[output]}
    if {"instruction", "output"} <= set(there):
        return _columns("alpaca", there, "instruction", "input", "output", "system", "history")
    label = _one(there, LABELS)
    if label and (found := _labelled(there, label)):
        return found
    prompt, completion = _one(there, PROMPTS), _one(there, COMPLETIONS)
    if prompt and completion:
        require(
            label is None,
            "data: columns must be one kind, got a label beside prompt and completion "
            f"({sorted(there.values())}); take one away, or name them with columns.",
        )
        there = {**there, "prompt": there[prompt], "completion": there[completion]}
        return _columns("completion", there, "prompt", "completion", "tools")
    if text := _one(there, TEXTS):
        theirs = there[completion] if completion else None
        require(
            completion is None,
            f"data: columns must be one kind, got a text and {theirs!r}; say which with columns: "
            f"label={theirs} or prompt={there[text]},completion={theirs}, or take it away.",
        )
        return Columns("text", {"text": there[text]})
    require(
        prompt is None,
        "data: columns must have completions or labels, got prompts only "
        f"({sorted(there.values())}), which are for rewards; add a column completion.",
    )
    return None


def _labelled(there: Mapping[str, str], label: str) -> Columns | None:
    """One text or two with a label."""
    if any(name in there for name in PROMPTS) and any(name in there for name in COMPLETIONS):
        return None
    for pair in PAIRS:
        if set(pair) <= set(there):
            first, second = (there[name] for name in pair)
            return Columns("label", {"text": first, "second": second, "label": there[label]})
    text = _one(there, TEXTS) or _one(there, PROMPTS)
    return Columns("label", {"text": there[text], "label": there[label]}) if text else None


def _one(there: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The name of ``names`` that is there; the first of them goes before all others.

    Raises:
        ValueError: there are several others.
    """
    found = [name for name in names if name in there]
    require(
        len(found) < 2 or found[0] == names[0],
        f"data: columns must have one {names[0]}, got {[there[name] for name in found]}; say which "
        f"with columns: {names[0]}={there[found[0]] if found else ''}, or give a template.",
    )
    return found[0] if found else None


def _columns(kind: str, there: Mapping[str, str], *names: str) -> Columns:
    return Columns(kind, {name: there[name] for name in names if name in there})
