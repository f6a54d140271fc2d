"""Rows of the user's data as examples: what is a prompt, what is to be learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mezo._inputs import number, plain, require, shown
from mezo.data.chats import Chats, checked_messages, from_sharegpt, unflagged, without_flags
from mezo.data.columns import Columns
from mezo.data.example import Example
from mezo.data.formats import Record

LABEL_INVOCATION = "Label:"
MAX_LABELS = 256  # more are texts, and each would be scored for each prompt


@dataclass(frozen=True)
class Rendering:
    """How rows become examples.

    Args:
        tokenizer: the model's.
        columns: what the columns mean.
        label_names: the labels' names, for kind "label".
        classes: the names whose indices the label's column holds; none if it does not.
        invocation: the run's, as token ids; chats must have it where their answers begin.
        completion_only_loss: False: the loss of prompts, too.
        assistant_only_loss: the loss of all assistant turns of conversations, and of nothing else.
        chat_template_path: file with a chat template.
        max_length: tokens of texts of which all are learnt; longer ones lose their ends.
    """

    tokenizer: Any
    columns: Columns
    label_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    chat_template_path: str | None = None
    max_length: int | None = None

    def renderer(self) -> Callable[[Record], list[Example]]:
        """Return the function from a row to its examples; it raises ValueError for a bad one.

        Raises:
            ValueError: options that the kind of data does not have, or no chat template.
        """
        kind = self.columns.kind
        require(
            not self.assistant_only_loss or kind in ("messages", "sharegpt"),
            f"data: assistant_only_loss must come with conversations, got {kind}; leave it out.",
        )
        require(
            self.completion_only_loss is None
            or kind in ("completion", "alpaca")
            or (self.completion_only_loss is False and kind != "label"),
            f"data: completion_only_loss must come with prompts and completions, got {kind}; leave "
            "it out.",
        )
        require(
            self.chat_template_path is None or kind not in ("label", "text"),
            f"data: chat_template_path must come with conversations, got {kind}; leave it out.",
        )
        if kind == "label":
            return self._label
        if kind == "text":
            self._require_no_invocation("text")
            return self._language
        if kind == "alpaca":
            return self._alpaca()
        if kind == "completion":
            if self.chat_template_path is not None:
                _ = self._chats  # which says what is wrong with the file
            return self._completion
        return self._conversation(self._chats)

    @cached_property
    def _chats(self) -> Chats:
        return Chats(self.tokenizer, self.chat_template_path)

    def _require_no_invocation(self, what: str) -> None:
        require(
            not self.invocation,
            f"data: an invocation must stand between prompt and completion, got {what} whose every "
            "token is learnt; use completions, assistant_only_loss, or prefix exact without one.",
        )

    def _label(self, record: Record) -> list[Example]:
        names, columns = self.label_names, self.columns
        text = _text(record, columns, "text")
        if "second" in columns.names:
            text = f"{text}\n{_text(record, columns, 'second')}"
        name = label_name(record.fields.get(columns.names["label"]), names, self.classes)
        return [
            Example(
                f"{text.strip()}\n",
                options=tuple(f" {n}" for n in names),
                label=names.index(name),
                answers=(name,),
                where=record.where,
            )
        ]

    def _language(self, record: Record) -> list[Example]:
        example = self._whole_text(record, _text(record, self.columns, "text"))
        if self.max_length is not None:
            # Of two tokens at least: one to read and one to learn.
            end = max(self.max_length, 2) - 1
            example = replace(example, completion=(example.completion or ())[:end])
        return [example]

    def _alpaca(self) -> Callable[[Record], list[Example]]:
        is_chat = self.tokenizer.chat_template or self.chat_template_path
        chats = self._chats if is_chat else None

        def render(record: Record) -> list[Example]:
            fields, names = record.fields, self.columns.names
            query = _text(record, self.columns, "instruction")
            if more := fields.get(names.get("input", "")):
                query = f"{query}\n{more}"
            output = _text(record, self.columns, "output")
            if chats is None:
                return [self._pair(record, f"{query}\n", output)]
            messages = []
            if system := fields.get(names.get("system", "")):
                messages.append({"role": "system", "content": system})
            for said, answered in fields.get(names.get("history", "")) or ():
                messages.append({"role": "user", "content": said})
                messages.append({"role": "assistant", "content": answered})
            messages.append({"role": "user", "content": query})
            answer = [{"role": "assistant", "content": output}]
            return [self._ids(record, *chats.answer(messages, answer))]

        return render

    def _completion(self, record: Record) -> list[Example]:
        names = self.columns.names
        prompt, completion = (record.fields.get(names[x]) for x in ("prompt", "completion"))
        if isinstance(prompt, str) or isinstance(completion, str):
            return [
                self._pair(
                    record,
                    _text(record, self.columns, "prompt"),
                    _text(record, self.columns, "completion"),
                )
            ]
        tools = record.fields.get(names.get("tools", ""))
        return [
            self._ids(
                record,
                *self._chats.answer(
                    unflagged(checked_messages(prompt)),
                    without_flags(checked_messages(completion)),
                    tools=tools,
                ),
            )
        ]

    def _conversation(self, chats: Chats) -> Callable[[Record], list[Example]]:
        names, is_sharegpt = self.columns.names, self.columns.kind == "sharegpt"
        if not self.assistant_only_loss:
            self._require_no_invocation("conversations")

        def render(record: Record) -> list[Example]:
            fields = record.fields
            if is_sharegpt:
                messages = from_sharegpt(
                    fields.get(names["conversations"]), fields.get(names.get("system", ""))
                )
            else:
                messages = checked_messages(fields.get(names["messages"]))
            tools = fields.get(names.get("tools", ""))
            if self.assistant_only_loss:
                turns = chats.turns(messages, tools=tools)
                return [self._ids(record, before, turn) for before, turn in turns]
            ids = chats.ids(without_flags(messages), tools=tools)
            return [Example(tuple(ids[:1]), completion=tuple(ids[1:]), where=record.where)]

        return render

    def _pair(self, record: Record, prompt: str, completion: str) -> Example:
        """A prompt and a completion as texts; the completion ends as the model ends its own."""
        eos = self.tokenizer.eos_token or ""
        if self.completion_only_loss is False:
            self._require_no_invocation("texts")
            return self._whole_text(record, prompt + completion)
        answer = completion.removesuffix(eos)
        return Example(
            prompt, completion=answer + eos, answers=(answer.strip(),), where=record.where
        )

    def _whole_text(self, record: Record, text: str) -> Example:
        """A text of which every token but the first is learnt."""
        tokenizer = self.tokenizer
        bos = tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(bos)
        ids = list(tokenizer(text.removeprefix(bos) if has_bos else text)["input_ids"])
        if has_bos and ids[:1] != [tokenizer.bos_token_id]:
            ids.insert(0, tokenizer.bos_token_id)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        require(len(ids) >= 2, f"a text must have at least two tokens, got {shown(text)}")
        return Example(tuple(ids[:1]), completion=tuple(ids[1:]), where=record.where)

    def _ids(self, record: Record, before: Sequence[int], turn: Sequence[int]) -> Example:
        """A prompt and an answer as token ids; the invocation is taken off the prompt."""
        if self.completion_only_loss is False:
            self._require_no_invocation("conversations")
            ids = [*before, *turn]
            return Example(tuple(ids[:1]), completion=tuple(ids[1:]), where=record.where)
        size = len(self.invocation)
        require(
            tuple(before[len(before) - size :]) == self.invocation,
            "a chat's prompt must end with the invocation's tokens, got others; leave the "
            "invocation out, which is then what opens the assistant's turn",
        )
        answer = self.tokenizer.decode(list(turn), skip_special_tokens=True).strip()
        return Example(
            tuple(before[: len(before) - size]),
            completion=tuple(turn),
            answers=(answer,),
            where=record.where,
        )


def label_names_of(values: Sequence[Any], names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of labels: those that the data has, else its values, sorted.

    Args:
        values: of the column.
        names: from the data's features, or None.

    Raises:
        ValueError: fewer than two, or so many that they are no classes.
    """
    if names:
        return tuple(names)
    texts = sorted({_value_name(value) for value in values if is_label(value)})
    if all(is_whole(name) for name in texts):
        texts.sort(key=int)
    require(
        2 <= len(texts) <= MAX_LABELS,
        f"data: labels must have 2 to {MAX_LABELS} values, got "
        f"{len(texts) if len(texts) > 2 else texts}; name the column with columns: label=THEIRS, "
        "or train on texts with columns: prompt=THEIRS,completion=THEIRS.",
    )
    return tuple(texts)


def is_label(value: Any) -> bool:
    """Return whether a value is a label: a text that is not blank, a bool or a whole number."""
    value = plain(value)
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, bool):
        return True
    found = number(value)
    return isinstance(found, int) or (isinstance(found, float) and found.is_integer())


def label_name(value: Any, names: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Return the name of a label's value.

    Args:
        value: a name, or an index into ``classes``.
        names: all names.
        classes: names of the column's classes, of which it holds the indices; none if it does not.

    Raises:
        ValueError: it is none of them.
    """
    remedy = ""
    if is_label(value):
        found: str | None = _value_name(value)
        index = None if isinstance(plain(value), bool) else number(value)
        if index is not None and classes:
            found = dict(enumerate(classes)).get(int(index))
        elif index is not None and found not in names:
            # A number would mean the names in an order that nobody gave.
            remedy = "; write names, or make the numbers the names of a template's options"
        if found is not None and found in names:
            return found
    raise ValueError(f"label must be one of {list(names)[:8]}, got {shown(value)}{remedy}")


def is_whole(name: str) -> bool:
    """Return whether a label's name is a whole number."""
    return name.removeprefix("-").isdecimal()


def _value_name(value: Any) -> str:
    """A label's value as a name."""
    value = plain(value)
    return str(int(value) if isinstance(value, float) else value).strip()


def _text(record: Record, columns: Columns, what: str) -> str:
    """A text of a row, or ValueError."""
    name = columns.names[what]
    value = record.fields.get(name)
    require(
        isinstance(value, str) and bool(value.strip()),
        f"{name} must be a text that is not empty, got {shown(value)}",
    )
    return str(value)
