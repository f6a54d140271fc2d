"""Rows as examples: labels of every kind, beginnings and ends that stand once."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from mezo.data.own import default_invocation, own_examples
from mezo.data.render import MAX_LABELS, label_name, label_names_of
from tests.mezo.data.test_own import CHAT, TEMPLATE
from tests.support.tiny import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def examples(rows, tokenizer, **options):
    return own_examples(rows, split="train", tokenizer=tokenizer, **options).examples


@pytest.mark.parametrize("value", [None, "", " ", float("nan"), float("inf"), 0.5, [1], {"a": 1}])
def test_what_is_no_label(value):
    with pytest.raises(ValueError, match=r"label must be one of \['no', 'yes'\], got"):
        label_name(value, ("no", "yes"))
    assert label_names_of(["no", value, "yes"], None) == ("no", "yes")


@pytest.mark.parametrize(
    ("value", "names", "classes", "expected"),
    [
        (1, ("no", "yes"), ("no", "yes"), "yes"),  # an index
        (np.int64(0), ("no", "yes"), ("yes", "no"), "yes"),
        (" yes ", ("no", "yes"), (), "yes"),
        (1, ("1", "2", "3"), (), "1"),  # a value
        (1, ("1", "2", "3"), ("1", "2", "3"), "2"),  # the index of a class
        ("1", ("1", "2", "3"), ("1", "2", "3"), "1"),
        (True, ("False", "True"), (), "True"),
    ],
)
def test_a_label_is_a_name_or_an_index(value, names, classes, expected):
    assert label_name(value, names, classes) == expected


@pytest.mark.parametrize(
    ("value", "names", "classes"),
    [
        (0, ("1", "2", "3"), ()),  # not the first one
        (1, ("no", "yes"), ()),  # in an order that nobody gave
        (True, ("no", "yes"), ()),
        (-1, ("-1", "1"), ("-1", "1")),  # a hidden label
        (2, ("no", "yes"), ("no", "yes")),
    ],
)
def test_a_label_that_is_not_there_is_no_other_one(value, names, classes):
    with pytest.raises(ValueError, match="label must be one of"):
        label_name(value, names, classes)


def test_texts_in_one_file_and_numbers_in_another(tokenizer):
    """ "later" < "urgent" says nothing about which of them is 1."""
    rows = [{"text": "w5", "label": x} for x in ("urgent", "later")]
    names = own_examples(rows, split="train", tokenizer=tokenizer).label_names
    numbers = [{"text": "w5", "label": x} for x in (0, 1)]
    with pytest.raises(ValueError, match=r"\['later', 'urgent'\], got 0; write names, or make the"):
        examples(numbers, tokenizer, label_names=names)
    source = datasets.Dataset.from_list(rows).class_encode_column("label")
    train = own_examples(source, split="train", tokenizer=tokenizer)
    made = examples(numbers, tokenizer, label_names=train.label_names, classes=train.classes)
    assert [e.label for e in made] == [0, 1]  # the train split says which is which


def test_classes_that_are_numbers_are_told_by_their_index(tokenizer):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])}
    )
    source = datasets.Dataset.from_dict({"text": ["w5", "w6"], "label": [1, 2]}, features)
    made = examples(source, tokenizer, invocation="Label:")
    assert [(e.label, e.answers) for e in made] == [(1, ("2",)), (2, ("3",))]


def test_numbers_as_labels_are_said():
    rows = [{"text": "w5", "label": 0}, {"text": "w6", "label": 1}]
    found = own_examples(rows, split="train", tokenizer=make_tokenizer(), invocation="Label:")
    assert found.sentence.endswith(": name them in a template)")


@pytest.mark.parametrize(
    ("values", "got"), [(["a", None], r"\['a'\]"), (range(MAX_LABELS + 1), str(MAX_LABELS + 1))]
)
def test_labels_that_are_no_classes(values, got):
    with pytest.raises(ValueError, match=f"labels must have 2 to 256 values, got {got}; name"):
        label_names_of(list(values), None)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_that_has_its_bos_token_has_it_once(adds_bos, tokenizer):
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    (example,) = examples([{"text": "<s> w5 w6"}], tokenizer)
    assert (example.prompt, example.completion) == ((1,), (5, 6, 2))


def test_a_text_of_a_tokenizer_without_bos(tokenizer):
    tokenizer.bos_token = None
    (example,) = examples([{"text": "w5 w6"}], tokenizer)
    assert (example.prompt, example.completion) == ((5,), (6, 2))


def test_answers_are_without_the_eos_token(tokenizer):
    made = examples([{"prompt": "w5", "completion": f" w6{e}"} for e in ("", "</s>")], tokenizer)
    assert made[0] == made[1]
    assert made[0].answers == ("w6",)


def test_the_loss_of_all_may_be_asked_for_where_it_is_all(tokenizer):
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": CHAT}]
    assert examples(rows, tokenizer, completion_only_loss=False) == examples(rows, tokenizer)
    rows = [{"text": f"w{i}", "label": f"w{i}"} for i in (5, 6)]
    with pytest.raises(ValueError, match="must come with prompts and completions, got label"):
        examples(rows, tokenizer, completion_only_loss=False, invocation="Label:")


def test_a_template_file_makes_chats_of_alpaca_rows(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    rows = [{"instruction": "w5", "output": "w6"}]
    found = default_invocation(rows, tokenizer, split="train", chat_template_path=str(path))
    assert found == (1, 0)
    (example,) = examples(rows, tokenizer, invocation=found, chat_template_path=str(path))
    assert (example.prompt, example.completion) == ((1, 0, 5, 2), (6, 2))
