"""The user's own data, in each shape and file that is accepted, as examples."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pytest
from tokenizers.processors import TemplateProcessing

from mezo.data.encode import encode, encode_invocation
from mezo.data.example import Example, batch_of
from mezo.data.load import load_records
from mezo.data.own import default_invocation, own_examples
from mezo.tasks.template import Template
from tests.support.files import write_jsonl
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


def only(source, tokenizer, **options):
    """The examples of the train split, with the invocation that the data has by default."""
    keys = ("columns", "assistant_only_loss", "completion_only_loss", "chat_template_path")
    invocation = options.pop("invocation", None) or default_invocation(
        source, tokenizer, split="train", **{k: options[k] for k in keys if k in options}
    )
    return own_examples(
        source, split="train", tokenizer=tokenizer, invocation=invocation, **options
    ).examples


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


# Length.


def test_a_long_row_loses_the_beginning_of_its_prompt(tokenizer):
    rows = [{"prompt": "<s> w5 w6 w7 w8", "completion": " w9"}]
    for limit, prompt in ((7, "<s> w5 w6 w7 w8"), (6, (1, 6, 7, 8)), (4, (1, 8))):
        assert only(rows, tokenizer, max_length=limit)[0].prompt == prompt
    with pytest.raises(ValueError, match="leave room for its prompt in max_length 3, got 2 tokens"):
        only(rows, tokenizer, max_length=3)


def test_a_long_text_loses_its_end(tokenizer):
    for limit, rest in ((5, (6, 7, 8, 2)), (4, (6, 7, 8)), (3, (6, 7)), (2, (6,))):
        (example,) = only([{"text": "w5 w6 w7 w8"}], tokenizer, max_length=limit)
        assert (example.prompt, example.completion) == ((5,), rest)


def test_the_longest_option_and_the_invocation_count(tokenizer):
    rows = [{"text": "w5 w6 w7", "label": x} for x in ("w8 w9", "w10")]
    made = only(rows, tokenizer, max_length=5, invocation="w4")
    assert (made[0].prompt, made[0].options) == ((6, 7), ((10,), (8, 9)))


def test_a_shortened_row_has_the_last_tokens_of_the_whole_one(tokenizer):
    """With what the tokenizer puts before it, and words that are many tokens."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    invocation = encode_invocation(" w4", tokenizer)
    rows = [{"prompt": " ".join(f"w{5 + i % 90}" for i in range(60)), "completion": " w8 \u00e9"}]
    (whole,) = encode(
        batch_of(only(rows, tokenizer, invocation=" w4")), tokenizer, invocation=invocation
    ).rows.tokens
    for limit in (64, 63, 30, 6):
        made = only(rows, tokenizer, invocation=" w4", max_length=limit)
        (row,) = encode(batch_of(made), tokenizer, invocation=invocation).rows.tokens
        assert row == (1, *whole[1 + len(whole) - limit :]) if limit < len(whole) else row == whole


def test_a_row_that_is_short_enough_stays_text(tokenizer):
    rows = [{"prompt": "w5 w6", "completion": " w7"}]
    for limit in (4, 100):
        assert only(rows, tokenizer, max_length=limit)[0].prompt == "w5 w6"


# Bad rows.


BAD = [
    ({"prompt": None, "completion": "w7"}, "prompt must be a text that is not empty, got None"),
    ({"prompt": "w5", "completion": " "}, "completion must be a text that is not empty, got ' '"),
    ({"prompt": 5, "completion": "w7"}, "prompt must be a text that is not empty, got 5"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(row, reason, tokenizer, tmp_path):
    good = {"prompt": "w5", "completion": "w6"}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, row, row, good])
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: {reason}; fix the row, or pass on_bad"):
        only(path, tokenizer)
    data = own_examples(path, split="train", tokenizer=tokenizer, on_bad_row="skip")
    assert len(data.examples) == 2
    assert data.bad_sentences() == [f"data: 2 rows were left out, the first one {path}:2: {reason}"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_lines_that_are_no_rows_are_skipped_and_counted(is_streamed, tokenizer, tmp_path):
    good = '{"prompt": "w5", "completion": "w6"}\n'
    files = {
        "a.jsonl": ("{oops\n" + good + '[1]\n{"prompt": \n' + good, (1, 3, 4)),
        "a.csv": ("prompt,completion\nw5\nw5,w6\nw5,w6\nw5,w6,w7\n", (2, 5)),
    }
    for name, (text, lines) in files.items():
        path = tmp_path / name
        path.write_text(text)
        more = {"on_bad_row": "skip", "streaming": is_streamed}
        data = own_examples(path, split="train", tokenizer=tokenizer, **more)
        assert [e.prompt for e in data.examples] == ["w5", "w5"]
        assert [where.rpartition(":")[2] for where in data.first_bad.values()] == [
            str(line) for line in lines
        ]
        assert "the first one" in data.bad_sentences()[0]
        with pytest.raises(ValueError, match=rf"{name}:{lines[0]} must (be JSON|have 2 values)"):
            list(
                own_examples(
                    path, split="train", tokenizer=tokenizer, streaming=is_streamed
                ).examples
            )


def test_many_reasons_are_not_all_said(tokenizer):
    rows = [{"prompt": "w5", "completion": x} for x in ("w6", *range(20))]
    data = own_examples(rows, split="train", tokenizer=tokenizer, on_bad_row="skip")
    assert len(data.bad_sentences()) == 6
    assert data.bad_sentences()[-1] == "data: 15 rows were left out for other reasons"


@pytest.mark.parametrize("missing", [float("nan"), np.float64("nan"), pd.NA, pd.NaT])
def test_what_pandas_has_for_a_missing_value_is_no_text(missing, tokenizer, chatty):
    row = {"instruction": "w5", "input": missing, "output": "w7", "system": missing}
    assert only([row], tokenizer) == only([{**row, "input": "", "system": None}], tokenizer)
    with pytest.raises(ValueError, match="row 1: title must have a value, got None"):
        only(
            [{"title": missing, "a": "w5"}],
            tokenizer,
            template=Template.of({"prompt": "{title}", "completion": "{a}"}),
            invocation="w4",
        )
    source = datasets.Dataset.from_pandas(pd.DataFrame({"text": ["w5"], "n": [float("nan")]}))
    assert next(iter(load_records(source).rows)).fields["n"] is None


def test_an_unknown_label_is_named(tokenizer):
    rows = [{"text": "w5", "label": "maybe"}]
    with pytest.raises(ValueError, match=r"label must be one of \['no', 'yes'\], got 'maybe'"):
        own_examples(
            rows, split="test", tokenizer=tokenizer, invocation="Label:", label_names=("no", "yes")
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_only_loss": True}, "assistant_only_loss must come with conversations"),
        ({"invocation": "w4", "completion_only_loss": False}, "an invocation must stand between"),
    ],
)
def test_options_that_the_data_does_not_have(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        only([{"prompt": "w5", "completion": "w6"}], tokenizer, **options)


def test_conversations_need_a_template(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="need a chat template, got a tokenizer without one"):
        only([{"messages": CHAT}], tokenizer)
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    made = only([{"messages": CHAT}], tokenizer, chat_template_path=str(path))
    tokenizer.chat_template = TEMPLATE
    assert made == only([{"messages": CHAT}], tokenizer)


def test_a_chat_template_that_nothing_uses_is_refused(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    for row in ({"text": "w5 w6"}, {"text": "w5", "label": "w7"}):
        rows = [row, {**row, "label": "w8"} if "label" in row else row]
        with pytest.raises(
            ValueError, match="chat_template_path must come with conversations, got"
        ):
            only(rows, tokenizer, chat_template_path=str(path))
    pair = {"prompt": "w5", "completion": "w6"}
    with pytest.raises(ValueError, match=r"chat_template_path must be a text file, got .*none"):
        only([pair], tokenizer, chat_template_path=str(tmp_path / "none"))
    template = Template.of({"prompt": "{prompt}", "completion": "{completion}"})
    with pytest.raises(ValueError, match="got a template of one's own; leave one of them out"):
        only([pair], tokenizer, chat_template_path=str(path), template=template, invocation="w4")


def test_a_stream_begins_anew_in_each_epoch(tokenizer, tmp_path):
    rows = [{"prompt": f"w{i}", "completion": "w6"} for i in range(5, 9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = own_examples(path, split="train", tokenizer=tokenizer, streaming=True)
    assert [e.prompt for e in data.examples] == [e.prompt for e in data.examples]
    assert len(list(data.examples)) == 4


def test_rows_that_a_stream_leaves_out_are_said_when_it_ends(tokenizer, tmp_path, caplog):
    rows = [{"prompt": "w5", "completion": x} for x in ("w6", "", "w7", "", None)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = own_examples(path, split="train", tokenizer=tokenizer, streaming=True, on_bad_row="skip")
    said = "data: 2 rows were left out, the first one {}:2: completion must be a text"
    for _ in range(2):  # of each pass, not of both
        assert len(list(data.examples)) == 2
        assert len(caplog.messages) == 2
        assert caplog.messages[0].startswith(said.format(path))
        caplog.clear()
    stream = iter(data.examples)
    assert [next(stream).completion, next(stream).completion] == ["w6</s>", "w7</s>"]
    stream.close()  # a training that ends within a pass
    assert len(caplog.messages) == 1
    assert "data: 1 rows were left out" in caplog.messages[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w5", "completion": "w6"},
        {"text": "w5 w6"},
        {"instruction": "w5", "output": "w6"},
    ],
)
def test_a_tokenizer_without_an_end_is_said(row, tokenizer):
    assert own_examples([row], split="train", tokenizer=tokenizer).warnings == ()
    tokenizer.eos_token = None
    (warning,) = own_examples([row], split="train", tokenizer=tokenizer).warnings
    assert warning.startswith("data: the tokenizer has no eos_token, so that texts are learnt")
    chat = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    tokenizer.chat_template = TEMPLATE
    assert own_examples([chat], split="train", tokenizer=tokenizer).warnings == ()
