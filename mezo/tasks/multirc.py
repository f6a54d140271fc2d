"""MultiRC: is an answer to a question about a paragraph right? Several may be.

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
"""

from __future__ import annotations

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, inner, items, jsonl, label_of, text_of

OPTIONS = ("No", "Yes")
LABELS = {False: 0, True: 1}


def word(record: Record) -> list[Example]:
    """One example per answer; the group is the question."""
    passage = inner(record, "passage")
    text = text_of(passage, "text")
    examples = []
    for number, question in enumerate(items(passage, "questions")):
        asked = text_of(question, "question")
        for answer in items(question, "answers"):
            prompt = (
                f"{text}\nQuestion: {asked}\n"
                f'I found this answer "{text_of(answer, "text")}". Is that correct?'
            )
            label = label_of(answer, LABELS)
            group = f"{record.where}, question {number}"
            examples.append(
                Example(prompt, options=OPTIONS, label=label, group=group, where=answer.where)
            )
    return examples


TASK = Task(
    name="multirc",
    load=PublicFiles(
        task="multirc",
        train=("train.jsonl",),
        test=("val.jsonl",),
        read=jsonl,
        word=word,
        source="SuperGLUE's MultiRC",
    ),
    invocation=" Yes or No?\n",
    metric="by_question",
)
