"""DROP: answer a question about a passage that takes counting or arithmetic.

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mezo._inputs import require
from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, inner, items, json_file, text_of


def read(path: Path) -> Iterator[Record]:
    """Yield passage, question, answer and validated_answers of each question."""
    for name in (passages := json_file(path)):
        passage = inner(Record(str(path), passages), name)
        for pair in items(passage, "qa_pairs"):
            yield Record(pair.where, {**pair.fields, "passage": passage.fields.get("passage")})


def word(record: Record) -> list[Example]:
    """Passage and question; the answer is to be learnt, validated ones are right too."""
    given = [inner(record, "answer")]
    if record.fields.get("validated_answers"):
        given += items(record, "validated_answers")
    answers = tuple(dict.fromkeys(text for text in map(_words, given) if text))
    require(
        bool(answers),
        f"{record.where}: answer must have a number, spans or a date, got none; fix the row.",
    )
    prompt = f"Passage: {text_of(record, 'passage')}\nQuestion: {text_of(record, 'question')}\n"
    return [Example(prompt, f" {answers[0]}\n", answers=answers, where=record.where)]


def _words(answer: Record) -> str:
    """An answer in words: its number, its spans or its date; "" where it has none."""
    fields = answer.fields
    if fields.get("number") not in (None, ""):
        return str(fields["number"])
    if fields.get("spans"):
        return ", ".join(str(span) for span in fields["spans"])
    date = fields.get("date") or {}
    return " ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))


TASK = Task(
    name="drop",
    load=PublicFiles(
        task="drop",
        train=("drop_dataset_train.json",),
        test=("drop_dataset_dev.json",),
        read=read,
        word=word,
        source="DROP",
    ),
    invocation="Answer:",
    metric="token_f1",
)
