"""Rows of the user's data as examples: what is a prompt, what is to be learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mezo._inputs import number, plain, require, shown
from mezo.data.chats import Chats, checked_messages, from_sharegpt
from mezo.data.columns import Columns
from mezo.data.example import Example
from mezo.data.formats import Record

LABEL_INVOCATION = "Label:"


@dataclass(frozen=True)
class Rendering:
    """How rows become examples.

    Args:
        tokenizer: the model's.
        columns: what the columns mean.
        label_names: the labels' names, for kind "label".
        invocation: the run's, as token ids; chats must have it where their answers begin.
        completion_only_loss: False: the loss of prompts, too.
        assistant_only_loss: the loss of all assistant turns of conversations, and of nothing else.
        chat_template_path: file with a chat template.
    """

    tokenizer: Any
    columns: Columns
    label_names: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    chat_template_path: str | None = None

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
            self.completion_only_loss is None or kind in ("completion", "alpaca"),
            f"data: completion_only_loss must come with prompts and completions, got {kind}; leave "
            "it out.",
        )
        if kind == "label":
            return self._label
        if kind == "text":
            self._require_no_invocation("text")
            return lambda record: [self._whole_text(record, _text(record, self.columns, "text"))]
        if kind == "alpaca":
            return self._alpaca()
        if kind == "completion":
            return self._completion
        return self._conversation(Chats(self.tokenizer, self.chat_template_path))

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
        name = label_name(record.fields.get(columns.names["label"]), names)
        return [
            Example(
                f"{text.strip()}\n",
                options=tuple(f" {n}" for n in names),
                label=names.index(name),
                answers=(name,),
                where=record.where,
            )
        ]

    def _alpaca(self) -> Callable[[Record], list[Example]]:
        chats = None
        if self.tokenizer.chat_template or self.chat_template_path:
            chats = Chats(self.tokenizer, self.chat_template_path)

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
        chats = Chats(self.tokenizer, self.chat_template_path)
        tools = record.fields.get("tools")
        return [
            self._ids(
                record,
                *chats.answer(checked_messages(prompt), checked_messages(completion), tools=tools),
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
            ids = chats.ids(
                [{k: v for k, v in m.items() if k != "loss"} for m in messages], tools=tools
            )
            return [Example(tuple(ids[:1]), completion=tuple(ids[1:]), where=record.where)]

        return render

    def _pair(self, record: Record, prompt: str, completion: str) -> Example:
        """A prompt and a completion as texts; the completion ends as the model ends its own."""
        eos = self.tokenizer.eos_token or ""
        if self.completion_only_loss is False:
            self._require_no_invocation("texts")
            return self._whole_text(record, prompt + completion)
        ended = completion if eos and completion.endswith(eos) else completion + eos
        return Example(prompt, completion=ended, answers=(completion.strip(),), where=record.where)

    def _whole_text(self, record: Record, text: str) -> Example:
        """A text of which every token but the first is learnt."""
        tokenizer = self.tokenizer
        ids = list(tokenizer(text)["input_ids"])
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
        ValueError: fewer than two.
    """
    if names:
        return tuple(names)
    found = {_value_name(value) for value in values} - {None}
    texts = [name for name in found if name is not None]
    numbers = [name for name in texts if name.lstrip("-").isdigit()]
    texts.sort(key=int if len(numbers) == len(texts) else str)  # type: ignore[arg-type]
    require(
        len(texts) >= 2,
        f"data: labels must have at least two values, got {texts}; name the column with columns: "
        "label=THEIRS.",
    )
    return tuple(texts)


def label_name(value: Any, names: Sequence[str]) -> str:
    """Return the name of a label's value, or raise ValueError."""
    name = _value_name(value)
    if name in names:
        assert name is not None
        return name
    index = number(value)
    is_index = isinstance(index, (int, float)) and index == int(index) and 0 <= index < len(names)
    require(
        is_index and not isinstance(plain(value), bool),
        f"label must be one of {list(names)[:8]}, got {shown(value)}",
    )
    assert index is not None
    return names[int(index)]


def _value_name(value: Any) -> str | None:
    """A label's value as a name; None for none."""
    value = plain(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _text(record: Record, columns: Columns, what: str) -> str:
    """A text of a row, or ValueError."""
    name = columns.names[what]
    value = record.fields.get(name)
    require(
        isinstance(value, str) and bool(value.strip()),
        f"{name} must be a text that is not empty, got {shown(value)}",
    )
    return str(value)
