"""Rows of own data that cannot be used, and what is said of them."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pytest

from mezo.data.load import load_records
from mezo.data.own import own_examples
from mezo.tasks.template import Template
from tests.mezo.data.test_own import CHAT, TEMPLATE
from tests.support.files import write_jsonl
from tests.support.own_rows import only
from tests.support.tiny import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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
