"""WSC: does a pronoun refer to a noun?

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
"""

from __future__ import annotations

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, inner, jsonl, label_of, text_of

OPTIONS = ("No", "Yes")
LABELS = {False: 0, True: 1}


def word(record: Record) -> list[Example]:
    """The text and a question about its pronoun."""
    target = inner(record, "target")
    prompt = (
        f"{text_of(record, 'text')}\nIn the previous sentence, does the pronoun "
        f'"{text_of(target, "span2_text").lower()}" refer to {text_of(target, "span1_text")}?'
    )
    return [Example(prompt, options=OPTIONS, label=label_of(record, LABELS), where=record.where)]


TASK = Task(
    name="wsc",
    load=PublicFiles(
        task="wsc",
        train=("train.jsonl",),
        test=("val.jsonl",),
        read=jsonl,
        word=word,
        source="SuperGLUE's WSC",
    ),
    invocation=" Yes or No?\n",
)
