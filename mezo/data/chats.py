"""Conversations as token ids, by the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from mezo._inputs import require, shown

Message = Mapping[str, Any]
_LOSS_FLAGS = ("loss", "weight", "train", "train_on_turn")  # of a message, in several formats
_ROLES = {  # ShareGPT's words
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


class Chats:
    """Renders conversations.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template_path: file with a chat template, in place of the tokenizer's own.

    Raises:
        ValueError: there is no template, or its file cannot be read.
    """

    def __init__(self, tokenizer: Any, template_path: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.template: str | None = tokenizer.chat_template
        if template_path is not None:
            try:
                self.template = Path(template_path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"data: chat_template_path must be a text file, got {template_path} ({error})."
                ) from error
        require(
            self.template is not None,
            "data: conversations need a chat template, got a tokenizer without one; pass "
            "chat_template_path, or prompt and completion as texts.",
        )
        self.has_markers = re.search(r"{%-?\s*generation\b", str(self.template)) is not None
        self._specials = _independent_specials(tokenizer)
        self._section_ids = lru_cache(maxsize=4096)(self._tokenised)  # headers and system prompts

    def ids(
        self, messages: Sequence[Message], *, tools: Any = None, opens: bool = False
    ) -> list[int]:
        """Return a conversation's token ids.

        Args:
            messages: role and content each.
            tools: as `apply_chat_template` takes them.
            opens: whether to end with what opens the assistant's turn.
        """
        text = self._rendered(messages, tools, add_generation_prompt=opens, tokenize=False)
        if self._specials is None:
            return list(self._tokenised(text))
        starts = [found.start() for found in self._specials.finditer(text)]
        borders = [0, *(start for start in starts if start > 0), len(text)]
        sections = (text[i:j] for i, j in pairwise(borders))
        return [token for section in sections for token in self._section_ids(section)]

    def _tokenised(self, text: str) -> tuple[int, ...]:
        """A rendered text's ids; the template has put the special tokens in already."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered(self, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
        """What `apply_chat_template` gives, or ValueError with what the template says."""
        from jinja2 import TemplateError

        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise ValueError(f"tools must be a list or its JSON, got {shown(tools)}") from error
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools or None, chat_template=self.template, **options
            )
        # Templates raise the first for roles out of order, the others for contents of other types.
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"the chat template must render the conversation, got: {error}"
            ) from error

    def header(self, messages: Sequence[Message], *, tools: Any = None) -> tuple[int, ...]:
        """Return the tokens that open the assistant's turn behind these messages."""
        closed = self.ids(messages, tools=tools)
        opened = self.ids(messages, tools=tools, opens=True)
        return tuple(opened[len(closed) :]) if opened[: len(closed)] == closed else ()

    def answer(
        self, prompt: Sequence[Message], completion: Sequence[Message], *, tools: Any = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt, with what opens the answer, and of the answer.

        The answer contains its end-of-turn token.

        Raises:
            ValueError: the template renders the prompt differently when an answer follows.
        """
        before = self.ids(prompt, tools=tools, opens=True)
        whole = self.ids([*prompt, *completion], tools=tools)
        require(
            whole[: len(before)] == before and len(whole) > len(before),
            "the chat template must render a prompt alike with and without its answer, got other "
            "tokens; pass chat_template_path with one that does",
        )
        return before, whole[len(before) :]

    def turns(
        self, messages: Sequence[Message], *, tools: Any = None
    ) -> list[tuple[list[int], list[int]]]:
        """Return (ids before, ids of the turn) of each assistant turn that counts.

        A turn contains its end-of-turn token. Messages with ``loss: False`` do not count.

        Raises:
            ValueError: the template has no generation markers and turns cannot be cut exactly
                without them, or there is no assistant turn.
        """
        counts = [m.get("loss") is not False for m in messages if m["role"] == "assistant"]
        require(any(counts), "a conversation must have an assistant's turn, got none that counts")
        plain = unflagged(messages)
        if self.has_markers:
            cut = self._marked(plain, tools)
            said = [m for m in plain if m["role"] == "assistant"]
            require(
                len(cut) == len(counts)
                or all(m.get("content") or m.get("tool_calls") for m in said),
                "an assistant's message must have content, got ''",
            )
            require(
                len(cut) == len(counts),
                f"the template's generation markers must hold each assistant turn, got {len(cut)} "
                f"for {len(counts)} turns; fix the template",
            )
        else:
            cut = self._cut(plain, tools)
        return [turn for turn, is_counted in zip(cut, counts, strict=True) if is_counted]

    def _marked(self, messages: Sequence[Message], tools: Any) -> list[tuple[list[int], list[int]]]:
        """Assistant turns between the template's markers."""
        found = self._rendered(
            messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
        special = set(self._tokenizer.all_special_ids)
        cut, i = [], 0
        while i < len(ids):
            if not mask[i]:
                i += 1
                continue
            end = i
            while end < len(ids) and mask[end]:
                end += 1
            # Without its end-of-turn token a model would never learn to end a turn.
            if end < len(ids) and ids[end] in special and ids[end - 1] not in special:
                end += 1
            cut.append((ids[:i], ids[i:end]))
            i = end
        return cut

    def _cut(self, messages: Sequence[Message], tools: Any) -> list[tuple[list[int], list[int]]]:
        """Assistant turns where the rendered beginnings of a conversation end."""
        whole = self.ids(messages, tools=tools)
        cut = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.ids(messages[:i], tools=tools, opens=True)
            is_last = i == len(messages) - 1
            after = whole if is_last else self.ids(messages[: i + 1], tools=tools)
            require(
                whole[: len(after)] == after and after[: len(before)] == before,
                "the chat template must have {% generation %} markers, or render the beginning of "
                "a conversation as in the whole one, got neither; pass chat_template_path with "
                "markers",
            )
            cut.append((before, after[len(before) :]))
        return cut


def _independent_specials(tokenizer: Any) -> re.Pattern[str] | None:
    """The special tokens that the texts before and behind them are tokenised apart from.

    A text is then the tokens of its sections, each of which begins with one; None where there are
    none, or where the tokenizer does not say.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    specials = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
    if not specials or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in specials):
        return None
    contents = sorted((t.content for t in specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)))


def checked_messages(value: Any) -> list[Message]:
    """Return a conversation that is one, or raise ValueError."""
    require(
        isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0,
        f"messages must be a list of role and content, got {shown(value)}",
    )
    for message in value:
        require(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and (message.get("content") is not None or message.get("tool_calls") is not None),
            f"a message must have role and content, got {shown(message)}",
        )
    return [_with_loss(message) for message in value]


def _with_loss(message: Message) -> Message:
    """A message without missing values, whose flag not to learn it is ``loss: False``."""
    # `datasets` gives every message all keys that one has.
    found = {k: v for k, v in message.items() if v is not None and k not in _LOSS_FLAGS}
    for name in _LOSS_FLAGS:
        flag = message.get(name)
        if flag is None:
            continue
        require(
            flag in (0, 1),
            f"a message's {name} must be 0 or 1, true or false, got {shown(flag)}; weights between "
            "are not supported",
        )
        if not flag:
            found["loss"] = False
    return found


def without_flags(messages: Sequence[Message]) -> list[Message]:
    """Return messages of which all are learnt or none; a flag not to learn one is refused.

    Raises:
        ValueError: a message of the assistant is flagged.
    """
    require(
        all(m.get("loss") is not False or m["role"] != "assistant" for m in messages),
        "a message that is not to be learnt (loss: false, weight: 0) must come with "
        "assistant_only_loss, got one whose every token is learnt; pass assistant_only_loss",
    )
    return unflagged(messages)


def unflagged(messages: Sequence[Message]) -> list[Message]:
    """Return messages as templates take them."""
    return [{k: v for k, v in m.items() if k != "loss"} for m in messages]


def from_sharegpt(conversation: Any, system: Any = None) -> list[Message]:
    """Return ShareGPT's {from, value} as role and content, or raise ValueError."""
    require(
        isinstance(conversation, Sequence) and not isinstance(conversation, str),
        f"conversations must be a list of from and value, got {shown(conversation)}",
    )
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for message in conversation:
        role = _ROLES.get(str(message.get("from"))) if isinstance(message, Mapping) else None
        require(
            role is not None and isinstance(message.get("value"), str),
            f"a message must have from (one of {sorted(_ROLES)}) and value, got {shown(message)}",
        )
        flags = {name: message[name] for name in _LOSS_FLAGS if name in message}
        messages.append({"role": role, "content": message["value"], **flags})
    return checked_messages(messages)
