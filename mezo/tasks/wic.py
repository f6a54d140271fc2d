"""WiC: has a word the same meaning in two sentences?

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E;
the word Answer is ours, since an invocation must be the same in all prompts.
"""

from __future__ import annotations

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, jsonl, label_of, text_of

OPTIONS = (" No", " Yes")
LABELS = {False: 0, True: 1}


def word(record: Record) -> list[Example]:
    """Question and both sentences."""
    first, second = text_of(record, "sentence1"), text_of(record, "sentence2")
    prompt = (
        f'Does the word "{text_of(record, "word")}" have the same meaning in these two sentences? '
        f"Yes, No?\n{first}\n{second}\n"
    )
    return [Example(prompt, options=OPTIONS, label=label_of(record, LABELS), where=record.where)]


TASK = Task(
    name="wic",
    load=PublicFiles(
        task="wic",
        train=("train.jsonl",),
        test=("val.jsonl",),
        read=jsonl,
        word=word,
        source="SuperGLUE's WiC",
    ),
    invocation="Answer:",
)
