"""Conversations by their template: cut where serving cuts them, refused in one sentence."""

from __future__ import annotations

import pytest

from mezo.data.chats import Chats
from tests.mezo.data.test_own import CHAT, TEMPLATE
from tests.support.tiny import make_tokenizer


@pytest.fixture
def tokenizer():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("lstrip", [False, True])
def test_sections_have_the_tokens_of_the_whole_text(tokenizer, opens, lstrip):
    """Texts that hold special tokens themselves, and one that swallows the blank before it."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens({"sep_token": AddedToken("<sep>", lstrip=lstrip)})
    chat = [{"role": "user", "content": "w5<s>w6 <sep>w7</s></s>  w8"}, *CHAT]
    expected = tokenizer.apply_chat_template(
        chat, add_generation_prompt=opens, tokenize=True, return_dict=True
    )["input_ids"]
    chats = Chats(tokenizer)
    assert chats.ids(chat, opens=opens) == expected
    assert (chats._specials is None) == lstrip


def test_what_a_template_refuses_is_one_sentence(tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="must render the conversation, got: roles must alternate"):
        Chats(tokenizer).ids(CHAT)


def test_contents_that_a_template_cannot_join_are_one_sentence(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]
    with pytest.raises(ValueError, match="must render the conversation, got: can only concatenate"):
        Chats(tokenizer).ids(parts)


def test_tools_may_be_json(tokenizer):
    tokenizer.chat_template = "{% for t in tools %}{{ t['name'] }} {% endfor %}" + TEMPLATE
    chats = Chats(tokenizer)
    assert chats.ids(CHAT, tools='[{"name": "w9"}]') == chats.ids(CHAT, tools=[{"name": "w9"}])
    assert chats.ids(CHAT, tools='[{"name": "w9"}]')[0] == 9
    with pytest.raises(ValueError, match="tools must be a list or its JSON, got 'w9'"):
        chats.ids(CHAT, tools="w9")


@pytest.mark.parametrize("begin", ["{% generation %}", "{%- generation -%}", "{%-  generation %}"])
def test_markers_are_found_however_they_are_written(tokenizer, begin):
    tokenizer.chat_template = f"{begin}{{% endgeneration %}}"
    assert Chats(tokenizer).has_markers
