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
