"""CB: does a text entail, contradict or leave open a hypothesis?

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
"""

from __future__ import annotations

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, jsonl, label_of, text_of

OPTIONS = ("Yes", "No", "Maybe")
LABELS = {"entailment": 0, "contradiction": 1, "neutral": 2}


def word(record: Record) -> list[Example]:
    """Premise and question."""
    premise, hypothesis = text_of(record, "premise"), text_of(record, "hypothesis")
    prompt = f'Suppose {premise} Can we infer that "{hypothesis}"?'
    return [Example(prompt, options=OPTIONS, label=label_of(record, LABELS), where=record.where)]


TASK = Task(
    name="cb",
    load=PublicFiles(
        task="cb",
        train=("train.jsonl",),
        test=("val.jsonl",),
        read=jsonl,
        word=word,
        source="SuperGLUE's CB",
    ),
    invocation=" Yes, No, or Maybe?\n",
    metric="f1",
)
