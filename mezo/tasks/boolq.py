"""BoolQ: a question about a passage, answered by yes or no.

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
    """Passage and question."""
    passage = text_of(record, "passage")
    prompt = f"{passage} {text_of(record, 'question').rstrip('?')}?\n"
    return [Example(prompt, options=OPTIONS, label=label_of(record, LABELS), where=record.where)]


TASK = Task(
    name="boolq",
    load=PublicFiles(
        task="boolq",
        train=("train.jsonl",),
        test=("val.jsonl",),
        read=jsonl,
        word=word,
        source="SuperGLUE's BoolQ",
    ),
    invocation="Answer:",
)
