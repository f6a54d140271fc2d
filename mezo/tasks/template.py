"""The user's own wording of the user's own data: the `template:` block of a YAML file."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mezo._inputs import as_list, nearest, plain, require, shown
from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.data.render import is_whole, label_name

_FIELDS = ("prompt", "invocation", "options", "label", "completion", "metric")


@dataclass(frozen=True)
class Template:
    """Words rows.

    Args:
        prompt: text with columns in braces, as "{title}\\n{text}"; ``{{`` is a brace.
        invocation: words between every prompt and its completion or options.
        options: {name of a label: its words}, with their leading blank; none for completions.
        label: the column with the label.
        completion: text with columns in braces.
        metric: name of the metric to report, or None.
        is_list: whether options came without names.
    """

    prompt: str
    invocation: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    label: str = "label"
    completion: str | None = None
    metric: str | None = None
    is_list: bool = False

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> Template:
        """Return the template of a block of a YAML file.

        Raises:
            ValueError: an unknown name, no prompt, neither or both of options and completion.
        """
        for name in block:
            near = nearest(str(name), _FIELDS)
            require(
                name in _FIELDS,
                f"template: names must be among {_FIELDS}, got {name!r}; "
                f"{f'use {near!r}' if near else 'take it away'}.",
            )
        for name in ("prompt", "invocation", "label", "completion", "metric"):
            value = block.get(name)
            require(
                (value is None and name != "prompt") or (isinstance(value, str) and bool(value)),
                f"template: {name} must be a text, got {shown(value)}; write it in quotes.",
            )
        require(
            (block.get("options") is None) != (block.get("completion") is None),
            "template: exactly one of options and completion must be given, got "
            f"{'neither' if block.get('options') is None else 'both'}; give options to classify, "
            "or a completion to write.",
        )
        options = _options(block.get("options"))
        given = {name: value for name, value in block.items() if value is not None}
        is_list = not isinstance(block.get("options"), Mapping)
        return cls(**{**given, "options": options, "is_list": is_list})

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(self.options)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prompts and completions are made of."""
        texts = [self.prompt, self.completion or ""]
        return tuple(dict.fromkeys(name for t in texts for _, name, *_ in _pieces(t) if name))

    def renderer(
        self, label_names: Mapping[str, Sequence[str]]
    ) -> Callable[[Record], list[Example]]:
        """Return the function from a row to its examples.

        Args:
            label_names: {column: names of its classes}, of which it holds the indices.

        Raises:
            ValueError: the label's column has classes, and none of them is an option.
        """
        names, classes = self.label_names, tuple(label_names.get(self.label, ()))
        if names and all(map(is_whole, names)):
            classes = ()  # the options say which number is which
        require(
            not (names and classes) or bool(set(names) & set(classes)),
            f"template: options must be named as the classes of column {self.label!r}, "
            f"{shown(list(classes))}, got {shown(list(names))}; write options as name: words.",
        )
        return lambda record: [self.word(record, classes)]

    def word(self, record: Record, classes: Sequence[str] = ()) -> Example:
        """Return a row's example.

        Args:
            record: the row.
            classes: the names whose indices the label's column holds; none if it does not.

        Raises:
            ValueError: a column that is not there, a value that is missing, or another label.
        """
        prompt = _filled(self.prompt, record)
        if self.completion is not None:
            completion = _filled(self.completion, record)
            return Example(
                prompt, completion=completion, answers=(completion.strip(),), where=record.where
            )
        names = self.label_names
        value = _value(record, self.label)
        if self.is_list and not any(map(is_whole, names)):
            classes = classes or names  # the order of a list says which number is which
        name = label_name(value, names, classes)
        return Example(
            prompt,
            options=tuple(self.options.values()),
            label=names.index(name),
            answers=(name,),
            where=record.where,
        )


def _options(value: Any) -> dict[str, str]:
    """{name: words}; a list names its words by themselves."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        found = {str(plain(name)): words for name, words in value.items()}
    else:
        found = {str(words).strip(): words for words in as_list(value) or []}
    require(
        len(found) >= 2 and all(isinstance(words, str) and words for words in found.values()),
        "template: options must be at least two texts, as a list or as name: words, got "
        f"{shown(value)}; begin each with a blank.",
    )
    return found


def _pieces(text: str) -> list[Any]:
    """What `string.Formatter` makes of a text with braces."""
    try:
        return list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(
            f"template: braces must hold column names, got {shown(text)} ({error}); write {{{{ for "
            "a brace."
        ) from error


def _filled(text: str, record: Record) -> str:
    """A text with a row's values in its braces."""
    parts: list[str] = []
    for literal, name, *_ in _pieces(text):
        parts.append(literal)
        if name is not None:
            parts.append(str(_value(record, name)))
    return "".join(parts)


def _value(record: Record, name: str) -> Any:
    """A column's value in a row; it must be there."""
    near = nearest(name, record.fields)
    require(
        name in record.fields,
        f"template: columns must be among {list(record.fields)}, got {name!r}; "
        f"{f'use {near!r}' if near else 'name another'}",
    )
    value = plain(record.fields[name])
    require(
        value is not None and str(value).strip() != "",
        f"{name} must have a value, got {shown(value)}",
    )
    return value
