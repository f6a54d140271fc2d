"""COPA: which of two sentences is the cause, or the effect, of a premise?

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E;
the connective stands in both options, behind a comma, so that the invocation is always the same.
"""

from __future__ import annotations

from mezo._inputs import require, shown
from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, jsonl, label_of, text_of

CONNECTIVES = {"cause": "because", "effect": "so"}
LABELS = {0: 0, 1: 1}


def word(record: Record) -> list[Example]:
    """The premise, continued by either alternative."""
    question = record.fields.get("question")
    require(
        question in ("cause", "effect"),
        f"{record.where}: question must be cause or effect, got {shown(question)}; fix the row.",
    )
    options = []
    for column in ("choice1", "choice2"):
        choice = text_of(record, column)
        options.append(f" {CONNECTIVES[str(question)]} {choice[0].lower()}{choice[1:]}")
    return [
        Example(
            text_of(record, "premise").rstrip("."),
            options=tuple(options),
            label=label_of(record, LABELS),
            where=record.where,
        )
    ]


TASK = Task(
    name="copa",
    load=PublicFiles(
        task="copa",
        train=("train.jsonl",),
        test=("val.jsonl",),
        read=jsonl,
        word=word,
        source="SuperGLUE's COPA",
    ),
    invocation=",",
)
