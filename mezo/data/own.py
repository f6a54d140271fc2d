"""The user's own data as examples: loaded, recognised, rendered, with its bad rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mezo._inputs import require
from mezo.data.chats import Chats, checked_messages, from_sharegpt, unflagged
from mezo.data.columns import Columns, recognise
from mezo.data.encode import Invocation, encode_invocation
from mezo.data.example import Example
from mezo.data.formats import Record, Restarting
from mezo.data.held_out import content_key
from mezo.data.lengths import shortened
from mezo.data.load import Records, load_records
from mezo.data.render import LABEL_INVOCATION, Rendering, is_whole, label_names_of

__all__ = ["OwnData", "default_invocation", "own_examples"]

logger = logging.getLogger(__name__)
_REASONS = 5  # that are said of rows which were left out
_ENDED = ("completion", "alpaca", "text")  # kinds of data whose texts get the model's end of text
_NO_END = (
    "data: the tokenizer has no eos_token, so that texts are learnt without an end and generating "
    "may not stop; write an end into the completions"
)


class Wording(Protocol):
    """A template: words rows itself."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the options, where there are any."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that prompts and completions are made of."""
        ...

    def renderer(
        self, label_names: Mapping[str, Sequence[str]], /
    ) -> Callable[[Record], list[Example]]:
        """Return the function from a row to its examples; it raises ValueError for a bad one.

        Raises:
            ValueError: the label's column has classes (in ``label_names``) and they are others.
        """
        ...


@dataclass
class OwnData:
    """Examples of the user's own data.

    Args:
        examples: of all rows; an iterable that begins anew each time where they are streamed.
        label_names: names of the options, where they have any.
        sentence: what was recognised.
        warnings: what else is to be said.
        bad_rows: {reason: rows that were left out for it}.
        first_bad: {reason: where it was first met}.
        asks: how a text is put to what was trained on this: "text" as it is, "line" with a line
            break behind it, "chat" as the user's message.
        classes: the names whose indices the label's column holds; none if it does not.
        records: the rows.
        says: the columns that tell rows apart, see `keys`.
    """

    examples: Any
    label_names: tuple[str, ...]
    sentence: str
    warnings: tuple[str, ...] = ()
    bad_rows: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    asks: str = "text"
    classes: tuple[str, ...] = ()
    records: Records = field(default_factory=lambda: Records((), ()))
    says: tuple[str, ...] = ()

    def keys(self) -> dict[str, str]:
        """Return {`Example.where`: what its row is told by}; labels do not count."""
        return {r.where: content_key(r, self.says) for r in self.records.rows}

    def bad_sentences(self) -> list[str]:
        """Say which rows were left out, for the most frequent reasons."""
        found = [
            f"data: {count} rows were left out, the first one {self.first_bad[reason]}: {reason}"
            for reason, count in self.bad_rows.most_common(_REASONS)
        ]
        more = sum(self.bad_rows.values()) - sum(n for _, n in self.bad_rows.most_common(_REASONS))
        return [*found, *([f"data: {more} rows were left out for other reasons"] if more else [])]


def own_examples(
    source: Any,
    *,
    split: str,
    tokenizer: Any,
    invocation: Any = None,
    columns: Mapping[str, str] | None = None,
    template: Wording | None = None,
    on_bad_row: str = "stop",
    max_length: int | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    chat_template_path: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    label_names: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
) -> OwnData:
    """Load a split of the user's data and word it.

    Args:
        source: see `mezo.data.load.load_records`, as are split, config, revision, streaming.
        split: name of the split.
        tokenizer: the model's.
        invocation: the run's, text or token ids, or None.
        columns: {what it means: the data's column}, see `mezo.data.columns.recognise`.
        template: words the rows in place of what columns mean.
        on_bad_row: "stop" raises at the first one, "skip" counts them.
        max_length: tokens of a row; a longer one loses the beginning of its prompt (never its bos
            token, its completion or its options).
        completion_only_loss: see `mezo.data.render.Rendering`, like the next two.
        assistant_only_loss: see there.
        chat_template_path: see there.
        config: of a hub data set.
        revision: of a hub data set.
        streaming: whether to read rows only when they are needed.
        label_names: the labels' names where another split has them already.
        classes: that split's `OwnData.classes`, for labels that are numbers without names here.

    Raises:
        ValueError: nothing there, columns that mean nothing, no good row, or a bad one.
    """
    records = load_records(
        source,
        split=split,
        config=config,
        revision=revision,
        streaming=streaming,
        keeps_bad=on_bad_row == "skip",
    )
    render: Callable[[Record], list[Example]]
    inserted, asks = encode_invocation(invocation, tokenizer), "text"
    if template is not None:
        require(
            chat_template_path is None,
            "data: chat_template_path must come with conversations, got a template of one's own; "
            "leave one of them out.",
        )
        names = template.label_names
        sentence = f"data: worded by the template, columns {', '.join(records.columns)}"
        render, says = template.renderer(records.label_names), template.columns
    else:
        found = recognise(records.columns, columns)
        sentence, asks = found.sentence, _asks(found, records, tokenizer, chat_template_path)
        names = label_names or _label_names(records, found, streaming=streaming)
        if names:
            sentence += f", labels {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        label = found.names.get("label", "")
        classes = tuple(records.label_names.get(label, ())) or classes
        says = tuple(name for name in found.names.values() if name != label)
        if names and all(map(is_whole, names)):
            sentence += " (numbers, which a model knows little about: name them in a template)"
        render = Rendering(
            tokenizer,
            found,
            names,
            classes,
            inserted.tokens,
            completion_only_loss,
            assistant_only_loss,
            chat_template_path,
            max_length,
        ).renderer()
    data = OwnData(*((), names, sentence), asks=asks, classes=classes, records=records, says=says)
    if template is None and found.kind in _ENDED and asks != "chat" and not tokenizer.eos_token:
        data.warnings = (_NO_END,)
    worder = _Worder(render, tokenizer, inserted, max_length, on_bad_row, data)
    if streaming:
        data.examples = Restarting(lambda: worder.streamed(records.rows))
        return data
    data.examples = list(worder(records.rows))
    require(
        bool(data.examples),
        f"data: there must be at least one good row in split {split!r}, got none of "
        f"{sum(data.bad_rows.values())}"
        + (f" ({next(iter(data.bad_rows))})" if data.bad_rows else "")
        + "; look at the file.",
    )
    return data


def _first(records: Records) -> Record | None:
    """The first row that is one."""
    return next((record for record in records.rows if not record.problem), None)


def _asks(found: Columns, records: Records, tokenizer: Any, chat_template_path: str | None) -> str:
    """See `OwnData.asks`."""
    has_template = bool(tokenizer.chat_template or chat_template_path)
    if found.kind in ("messages", "sharegpt"):
        return "chat"
    if found.kind == "completion":
        first = _first(records)
        prompt = "" if first is None else first.fields.get(found.names["prompt"])
        return "text" if isinstance(prompt, str) else "chat"
    if found.kind == "alpaca":
        return "chat" if has_template else "line"
    return "line" if found.kind == "label" else "text"


def default_invocation(
    source: Any,
    tokenizer: Any,
    *,
    split: str,
    columns: Mapping[str, str] | None = None,
    chat_template_path: str | None = None,
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> str | tuple[int, ...] | None:
    """Return what stands between prompt and completion in data that has no invocation given.

    Returns:
        "Label:" for texts with labels, the tokens that open the assistant's turn for chats, and
        None for plain completions and for data whose every token is learnt.
    """
    records = load_records(
        source, split=split, config=config, revision=revision, streaming=streaming
    )
    found = recognise(records.columns, columns)
    if found.kind == "label":
        return LABEL_INVOCATION
    first = _first(records)
    if first is None or completion_only_loss is False:
        return None
    fields, names = first.fields, found.names
    try:
        if found.kind == "alpaca" and (tokenizer.chat_template or chat_template_path):
            messages = [{"role": "user", "content": str(fields.get(names["instruction"]))}]
        elif found.kind == "completion" and not isinstance(fields.get(names["prompt"]), str):
            messages = unflagged(checked_messages(fields.get(names["prompt"])))  # type: ignore[assignment]
        elif found.kind in ("messages", "sharegpt") and assistant_only_loss:
            key = names.get("messages") or names["conversations"]
            read = checked_messages if found.kind == "messages" else from_sharegpt
            messages = _before_answer(unflagged(read(fields.get(key))))
        else:
            return None
        return Chats(tokenizer, chat_template_path).header(messages) or None
    except ValueError:
        return None  # a bad first row: said when all are rendered


def _before_answer(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The messages before the first answer."""
    roles = [message["role"] for message in messages]
    return list(messages[: roles.index("assistant")] if "assistant" in roles else messages)


def _label_names(records: Records, found: Columns, *, streaming: bool) -> tuple[str, ...]:
    """Names of the labels; none for other kinds of data."""
    if found.kind != "label":
        return ()
    column = found.names["label"]
    names = records.label_names.get(column)
    require(
        bool(names) or not streaming,
        "data: labels that are streamed must have names in the data, got none; leave streaming "
        "out, or give a template with options.",
    )
    values = [] if names else [record.fields.get(column) for record in records.rows]
    return label_names_of(values, names)


@dataclass
class _Worder:
    """Rows to examples, with what becomes of bad ones."""

    render: Callable[[Record], list[Example]]
    tokenizer: Any
    invocation: Invocation
    max_length: int | None
    on_bad_row: str
    data: OwnData

    def __call__(self, rows: Iterable[Record]) -> Iterator[Example]:
        for record in rows:
            try:
                require(not record.problem, record.problem)
                made = [
                    shortened(example, self.tokenizer, self.invocation, self.max_length)
                    for example in self.render(record)
                ]
            except ValueError as error:
                reason = str(error)
                if self.on_bad_row == "stop":
                    raise ValueError(
                        f"data: {record.where}: {reason.rstrip('.')}; fix the row, or pass "
                        "on_bad_row=skip."
                    ) from error
                self.data.bad_rows[reason] += 1
                self.data.first_bad.setdefault(reason, record.where)
                continue
            yield from made

    def streamed(self, rows: Iterable[Record]) -> Iterator[Example]:
        """The same of a stream; what was left out is said when a pass over it ends."""
        self.data.bad_rows.clear()
        try:
            yield from self(rows)
        finally:
            for sentence in self.data.bad_sentences():
                logger.warning("%s", sentence)
