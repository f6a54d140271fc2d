"""Which columns mean what."""

from __future__ import annotations

import pytest

from mezo.data.columns import recognise


@pytest.mark.parametrize(
    ("columns", "kind", "names"),
    [
        (("question", "answer"), "completion", ("question", "answer")),
        (("instruction", "response"), "completion", ("instruction", "response")),
        (("review", "sentiment"), "label", ("review", "sentiment")),
        (("passage", "question", "label"), "label", ("passage", "question", "label")),
        (("content",), "text", ("content",)),
        (("messages", "tools", "id"), "messages", ("messages", "tools")),
        (("conversations", "system"), "sharegpt", ("conversations", "system")),
        (("instruction", "input", "output"), "alpaca", ("instruction", "input", "output")),
    ],
)
def test_usual_names_are_recognised(columns, kind, names):
    found = recognise(columns)
    assert (found.kind, tuple(found.names.values())) == (kind, names)
    assert all(name in found.sentence for name in names)


def test_names_may_be_given():
    found = recognise(("a", "b", "text"), {"prompt": "a", "completion": "b"})
    assert (found.kind, dict(found.names)) == ("completion", {"prompt": "a", "completion": "b"})


@pytest.mark.parametrize(
    ("columns", "overrides", "message"),
    [
        (("a", "b"), None, r"columns must be prompt \+ completion, .* got \['a', 'b'\]"),
        (("prompt", "chosen", "rejected"), None, "got preferences"),
        (("prompt",), None, "got prompts only"),
        (("prompt", "completion", "label"), None, "got a label beside prompt and completion"),
        (
            ("question", "answer"),
            {"prompt": "questoin"},
            "got 'questoin' for prompt; use 'question'",
        ),
        (("a",), {"promt": "a"}, "columns must give one of .* got 'promt'"),
    ],
)
def test_columns_that_mean_nothing(columns, overrides, message):
    with pytest.raises(ValueError, match=message):
        recognise(columns, overrides)


def test_names_count_in_small_letters():
    found = recognise((" Review ", "SENTIMENT", "id"))
    assert dict(found.names) == {"text": " Review ", "label": "SENTIMENT"}
    assert (
        found.sentence == "data: text =  Review , label = SENTIMENT (text and label, not used: id)"
    )


def test_the_first_of_two_that_differ_in_capitals_is_meant():
    assert recognise(("text", "Text")).names == {"text": "text"}
    assert recognise(("Text", "text")).names == {"text": "Text"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("question", "answer", "solution"), r"one completion, got \['answer', 'solution'\]; say"),
        (("query", "question", "answer"), r"one prompt, got \['query', 'question'\]; say which"),
        (("text", "category", "topic"), r"one label, got \['category', 'topic'\]; say which"),
        (
            ("text", "target"),
            "got a text and 'target'; say which with columns: label=target or pro",
        ),
        (("sentence", "review", "label"), r"one text, got \['sentence', 'review'\]; say which"),
    ],
)
def test_two_columns_for_one_thing(columns, message):
    with pytest.raises(ValueError, match=message):
        recognise(columns)


@pytest.mark.parametrize(
    ("columns", "overrides", "names"),
    [
        (("question", "answer", "solution"), {"completion": "solution"}, ["question", "solution"]),
        (("prompt", "query", "answer"), None, ["prompt", "answer"]),
        (("text", "review", "label", "topic"), None, ["text", "label"]),
        (("sentence", "review", "label"), {"text": "review"}, ["review", "label"]),
    ],
)
def test_ours_and_those_given_go_before_others(columns, overrides, names):
    assert list(recognise(columns, overrides).names.values()) == names


def test_overrides_that_are_all_go_before_other_shapes():
    columns = ("messages", "text", "topic")
    assert recognise(columns, {"text": "text", "label": "topic"}).kind == "label"
    assert recognise(columns).kind == "messages"


def test_the_input_of_an_instruction_is_never_dropped():
    found = recognise(("instruction", "input", "response"))
    assert (found.kind, found.names["output"], found.unused) == ("alpaca", "response", ())


def test_columns_that_are_not_used_are_said():
    found = recognise(("context", "question", "answer"))
    assert found.sentence == (
        "data: prompt = question, completion = answer (prompt and completion, not used: context)"
    )
