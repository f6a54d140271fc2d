"""SQuAD 1.1: answer a question about a paragraph in its words.

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mezo._inputs import require
from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, items, json_file, text_of


def read(path: Path) -> Iterator[Record]:
    """Yield title, context, question and answers of each question."""
    for article in items(Record(str(path), json_file(path)), "data"):
        for paragraph in items(article, "paragraphs"):
            for question in items(paragraph, "qas"):
                fields = {
                    "title": article.fields.get("title"),
                    "context": paragraph.fields.get("context"),
                    "question": question.fields.get("question"),
                    "answers": question.fields.get("answers"),
                }
                yield Record(question.where, fields)


def word(record: Record) -> list[Example]:
    """Title, context and question; the first answer is to be learnt, each one is right."""
    answers = tuple(dict.fromkeys(text_of(answer, "text") for answer in items(record, "answers")))
    require(
        bool(answers), f"{record.where}: answers must have one at least, got none; fix the row."
    )
    prompt = (
        f"Title: {text_of(record, 'title')}\nContext: {text_of(record, 'context')}\n"
        f"Question: {text_of(record, 'question')}\n"
    )
    return [Example(prompt, f" {answers[0]}\n", answers=answers, where=record.where)]


TASK = Task(
    name="squad",
    load=PublicFiles(
        task="squad",
        train=("train-v1.1.json",),
        test=("dev-v1.1.json",),
        read=read,
        word=word,
        source="SQuAD 1.1",
    ),
    invocation="Answer:",
    metric="token_f1",
)
