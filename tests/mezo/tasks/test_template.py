"""The user's own wording."""

from __future__ import annotations

import numpy as np
import pytest

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.sampling import k_shot
from mezo.tasks.template import Template

BLOCK = {
    "prompt": "{title}\n{text}",
    "invocation": " Topic:",
    "options": {"sport": " sports", "tech": " technology"},
    "label": "topic",
}


def word(block, **fields):
    return Template.of(block).word(Record("rows.csv:2", fields))


def test_a_row_is_worded():
    assert word(BLOCK, title="A", text="b", topic="tech") == Example(
        "A\nb", options=(" sports", " technology"), label=1, answers=("tech",)
    )
    template = Template.of(BLOCK)
    assert (template.invocation, template.label_names) == (" Topic:", ("sport", "tech"))
    assert template.metric is None


def test_a_completion_is_worded():
    block = {"prompt": "Q: {q} {{now}}", "completion": " {a}", "metric": "exact_match"}
    assert word(block, q="why", a=4) == Example("Q: why {now}", completion=" 4", answers=("4",))


@pytest.mark.parametrize(
    "label", ["tech", 1, np.int64(1), np.int32(1), 1.0, np.float32(1), np.array(1)]
)
def test_labels_are_names_or_places(label):
    assert word(BLOCK | {"options": ["sport", "tech"]}, title="A", text="b", topic=label).label == 1
    if label != "tech":
        numbered = {"options": {1: " technology", 0: " sports"}}
        assert word(BLOCK | numbered, title="A", text="b", topic=label).label == 0


@pytest.mark.parametrize("options", [{"tech": " t", "sport": " s"}, [" tech", " sport"]])
def test_classes_of_the_label_s_column_go_before_the_order_of_options(options):
    row = Record("row 1", {"title": "A", "text": "b", "topic": 0})
    template = Template.of(BLOCK | {"options": options})
    (example,) = template.renderer({"topic": ("sport", "tech", "arts")})(row)
    assert (example.label, example.answers) == (1, ("sport",))
    with pytest.raises(ValueError, match=r"must be named as the classes of column 'topic', \['x'"):
        template.renderer({"topic": ("x", "y")})
    numbered = Template.of(BLOCK | {"options": {1: " b", 0: " a"}})
    assert numbered.renderer({"topic": ("x", "y")})(row)[0].label == 1
    assert template.columns == ("title", "text")


def test_options_as_a_list_and_labels_that_are_bools():
    block = {"prompt": "{t}", "options": [" bad", " good"], "label": "is"}
    assert word(block, t="x", **{"is": "good"}).label == 1
    block["options"] = {False: " no", True: " yes"}
    assert word(block, t="x", **{"is": True}).label == 1
    assert word(block, t="x", **{"is": np.bool_(False)}).label == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optoins": []}, "names must be among .* got 'optoins'; use 'options'"),
        ({"prompt": None}, "prompt must be a text, got None"),
        ({"completion": "{a}"}, "exactly one of options and completion must be given, got both"),
        ({"options": None}, "exactly one of options and completion must be given, got neither"),
        ({"options": [" one"]}, r"options must be at least two texts, .* got \[' one'\]"),
        ({"label": 5}, "label must be a text, got 5"),
    ],
)
def test_a_bad_block_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Template.of(BLOCK | change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"titel": "A"}, "columns must be among .* got 'title'; use 'titel'"),
        ({"title": " "}, "title must have a value, got ' '"),
        ({"title": None}, "title must have a value, got None"),
        ({"title": "A", "topic": "arts"}, r"label must be one of \['sport', 'tech'\], got 'arts'"),
        ({"title": "A", "topic": 2}, "label must be one of .* got 2"),
        ({"title": "A", "topic": 0}, "got 0; write names, or make the numbers the names of"),
        ({"title": "A", "topic": 0.5}, "label must be one of .* got 0.5"),
        ({"title": "A", "topic": True}, "label must be one of .* got True"),
    ],
)
def test_a_bad_row_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        word(BLOCK, **{"text": "b", "topic": "tech", **fields})


def test_braces_that_do_not_close_are_refused():
    with pytest.raises(ValueError, match=r"braces must hold column names, got '{t'"):
        word({"prompt": "{t", "completion": "a"}, t="x")


def examples(count, labels=2):
    return [Example(f"w{i}", options=("a", "b", "c"), label=i % labels) for i in range(count)]


def test_k_shot_draws_k_of_each_label():
    drawn = k_shot(examples(60, 3), 16, seed=1)
    assert sorted(e.label for e in drawn) == [0] * 16 + [1] * 16 + [2] * 16
    assert len({e.prompt for e in drawn}) == 48
    assert drawn == k_shot(examples(60, 3), 16, seed=1) != k_shot(examples(60, 3), 16, seed=2)
    assert [e.label for e in drawn] != sorted(e.label for e in drawn)


def test_k_shot_of_completions_is_k():
    there = [Example(f"w{i}", completion="a") for i in range(9)]
    assert len(k_shot(there, 4, seed=0)) == 4


def test_k_shot_of_too_few_is_refused():
    with pytest.raises(ValueError, match="got 6 for 5 examples of label 0; lower k_shot"):
        k_shot(examples(10), 6, seed=0)
