"""Conversations of the user's own data: flags of messages, tools, empty turns."""

from __future__ import annotations

import pytest

from mezo.data.encode import encode_invocation
from mezo.data.own import own_examples
from tests.mezo.data.test_own import CHAT, MARKED, TEMPLATE, chatty, only, tokenizer

__all__ = ["chatty", "tokenizer"]  # fixtures


FLAGS = [{"loss": False}, {"weight": 0}, {"train": False}, {"weight": 0.0, "loss": None}]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_messages_are_heeded_in_each_shape(flag, chatty):
    other = dict.fromkeys(flag, 1)
    flags = [{}, flag, {}, other]
    chat = [{**m, **f} for m, f in zip(CHAT, flags, strict=True)]
    names = {"user": "human", "assistant": "gpt"}
    theirs = [
        {"from": names[m["role"]], "value": m["content"], **f}
        for m, f in zip(CHAT, flags, strict=True)
    ]
    for row in ({"messages": chat}, {"conversations": theirs}):
        (example,) = only([row], chatty, assistant_only_loss=True)
        assert (example.prompt[-3:], example.completion) == ((0, 12, 2), (21, 22, 2))
        with pytest.raises(ValueError, match="got one whose every token is learnt; pass assistant"):
            only([row], chatty)
    row = {"prompt": CHAT[:1], "completion": [{**CHAT[1], **flag}]}
    with pytest.raises(ValueError, match=r"not to be learnt .* must come with assistant_only_loss"):
        only([row], chatty)
    row = {"prompt": [CHAT[0], {**CHAT[1], **flag}, CHAT[2]], "completion": [CHAT[3] | other]}
    assert only([row], chatty)[0].completion == (21, 22, 2)


def test_a_weight_between_is_refused(chatty):
    messages = [CHAT[0], {**CHAT[1], "weight": 0.5}]
    with pytest.raises(ValueError, match=r"a message's weight must be 0 or 1, .* got 0.5; weights"):
        only([{"messages": messages}], chatty, assistant_only_loss=True)


def test_an_empty_answer_is_the_row_s_fault(tokenizer):
    tokenizer.chat_template = MARKED
    rows = [{"messages": [*CHAT[:3], {**CHAT[3], "content": ""}]}]
    with pytest.raises(ValueError, match="row 1: an assistant's message must have content, got ''"):
        only(rows, tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize("shape", ["messages", "completion"])
def test_tools_are_rendered_and_said(shape, chatty):
    chatty.chat_template = "{% if tools %}{{ 'w9 ' }}{% endif %}" + TEMPLATE
    row = (
        {"messages": CHAT} if shape == "messages" else {"prompt": CHAT[:1], "completion": CHAT[1:]}
    )
    tools = [{"type": "function", "function": {"name": "w5", "parameters": {}}}]
    data = own_examples([{**row, "tools": tools}], split="train", tokenizer=chatty)
    assert "tools = tools" in data.sentence
    assert "not used" not in data.sentence
    assert data.examples[0].prompt[0] == 9


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("w5", "messages must be a list of role and content, got 'w5'"),
        ([{"role": "user"}], "a message must have role and content"),
        ([{"role": "user", "content": "w5"}], "must have an assistant's turn, got none"),
    ],
)
def test_a_bad_conversation(messages, reason, chatty):
    with pytest.raises(ValueError, match=f"row 1: .*{reason}"):
        only([{"messages": messages}], chatty, assistant_only_loss=True)


def test_a_template_whose_turns_cannot_be_cut_is_refused(tokenizer):
    tokenizer.chat_template = "{% if messages|length > 1 %}w9 {% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match=r"must have \{% generation %\} markers, or render"):
        only([{"messages": CHAT}], tokenizer, assistant_only_loss=True)


def test_the_invocation_of_a_chat_is_the_run_s(chatty):
    with pytest.raises(ValueError, match="a chat's prompt must end with the invocation's tokens"):
        only([{"messages": CHAT}], chatty, assistant_only_loss=True, invocation="w9")
    assert encode_invocation((1, 0), chatty).tokens == (1, 0)
