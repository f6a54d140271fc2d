"""The user's own data, in each shape and file that is accepted, as examples."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from mezo.data.example import Example
from mezo.data.own import default_invocation, own_examples
from tests.support.own_rows import only
from tests.support.tiny import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "w10 w11"},
    {"role": "assistant", "content": "w20"},
    {"role": "user", "content": "w12"},
    {"role": "assistant", "content": "w21 w22"},
]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# Shapes.


def test_prompt_and_completion_end_with_eos_once(tokenizer):
    rows = [
        {"prompt": "w5 w6", "completion": " w7"},
        {"prompt": "w5", "completion": " w8 </s>"},
    ]
    made = only(rows, tokenizer)
    assert made == [
        Example("w5 w6", completion=" w7</s>", answers=("w7",)),
        Example("w5", completion=" w8 </s>", answers=("w8",)),
    ]
    assert [e.where for e in made] == ["row 1", "row 2"]
    assert tokenizer(made[0].completion)["input_ids"] == [7, 2]


def test_the_loss_of_prompts_too(tokenizer):
    rows = [{"prompt": "w5 w6", "completion": " w7"}]
    (example,) = only(rows, tokenizer, completion_only_loss=False)
    assert (example.prompt, example.completion) == ((5,), (6, 7, 2))


def test_text_learns_every_token_but_the_first_and_its_end(tokenizer):
    (example,) = only([{"text": "w5 w6 w7"}], tokenizer)
    assert (example.prompt, example.completion) == ((5,), (6, 7, 2))


@pytest.mark.parametrize(
    ("values", "names", "label"),
    [
        (["good", "bad"], ("bad", "good"), 1),
        ([1, 0], ("0", "1"), 1),
        ([True, False], ("False", "True"), 1),
        ([np.int64(3), np.int64(10)], ("3", "10"), 0),
        ([2.0, 1.0], ("1", "2"), 1),
        (["10", "9"], ("9", "10"), 1),
    ],
)
def test_labels_of_all_kinds(values, names, label, tokenizer):
    rows = [{"text": f"w{i + 5}", "label": value} for i, value in enumerate(values)]
    data = own_examples(rows, split="train", tokenizer=tokenizer, invocation="Label:")
    assert data.label_names == names
    first = data.examples[0]
    assert first.prompt == "w5\n"
    assert (first.options, first.label) == (tuple(f" {n}" for n in names), label)
    assert default_invocation(rows, tokenizer, split="train") == "Label:"


def test_label_names_of_a_data_set(tokenizer):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    source = datasets.Dataset.from_dict({"sentence": ["w5", "w6"], "label": [1, 0]}, features)
    made = only(source, tokenizer)
    assert [(e.options, e.label) for e in made] == [((" no", " yes"), 1), ((" no", " yes"), 0)]


def test_two_texts_with_a_label(tokenizer):
    rows = [{"premise": "w5", "hypothesis": "w6", "label": x} for x in ("no", "yes")]
    assert only(rows, tokenizer)[0].prompt == "w5\nw6\n"


def test_alpaca_as_text_and_as_chat(tokenizer):
    rows = [
        {"instruction": "w5", "input": "w6", "output": "w7"},
        {"instruction": "w8", "input": "", "output": "w9"},
    ]
    plain = only(rows, tokenizer)
    assert [(e.prompt, e.completion) for e in plain] == [
        ("w5\nw6\n", "w7</s>"),
        ("w8\n", "w9</s>"),
    ]
    tokenizer.chat_template = TEMPLATE
    header = default_invocation(rows, tokenizer, split="train")
    assert header == (1, 0)  # <s> assistant
    chat = only(rows, tokenizer)
    assert (chat[0].prompt, chat[0].completion) == ((1, 0, 5, 6, 2), (7, 2))


def test_a_conversation_as_prompt_and_completion(chatty):
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:2]}]
    (example,) = only(rows, chatty)
    assert (example.prompt, example.completion) == ((1, 0, 10, 11, 2), (20, 2))
    assert example.answers == ("w20",)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_assistant_turns_have_their_end_inside(tokenizer, template):
    tokenizer.chat_template = template
    first, second = only([{"messages": CHAT}], tokenizer, assistant_only_loss=True)
    assert (first.prompt, first.completion) == ((1, 0, 10, 11, 2), (20, 2))
    assert second.prompt == (1, 0, 10, 11, 2, 1, 0, 20, 2, 1, 0, 12, 2)
    assert second.completion == (21, 22, 2)


def test_marked_turns_are_transformers_own_mask_with_the_end(tokenizer):
    tokenizer.chat_template = MARKED
    found = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = [t for t, m in zip(found["input_ids"], found["assistant_masks"], strict=True) if m]
    made = only([{"messages": CHAT}], tokenizer, assistant_only_loss=True)
    assert [t for e in made for t in e.completion if t != 2] == masked == [20, 21, 22]


def test_a_turn_without_loss_does_not_count(chatty):
    messages = [CHAT[0], {**CHAT[1], "loss": False}, *CHAT[2:]]
    (example,) = only([{"messages": messages}], chatty, assistant_only_loss=True)
    assert example.completion == (21, 22, 2)


def test_messages_learn_every_token_unless_asked_otherwise(chatty):
    (example,) = only([{"messages": CHAT[:2]}], chatty)
    assert (example.prompt, example.completion) == ((1,), (0, 10, 11, 2, 1, 0, 20, 2))


def test_sharegpt_is_the_same_conversation(chatty):
    conversation = [
        {"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in CHAT
    ]
    theirs = only([{"conversations": conversation}], chatty, assistant_only_loss=True)
    assert theirs == only([{"messages": CHAT}], chatty, assistant_only_loss=True)


def test_a_bos_token_is_there_once(chatty):
    """A tokenizer that puts one before every text, and a template that has one, too."""
    chatty.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert chatty("w5")["input_ids"] == [1, 5]
    (example,) = only([{"prompt": CHAT[:1], "completion": CHAT[1:2]}], chatty)
    assert example.prompt == (1, 0, 10, 11, 2)
    (text,) = only([{"text": "w5 w6"}], chatty)
    assert (text.prompt, text.completion) == ((1,), (5, 6, 2))
