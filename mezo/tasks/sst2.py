"""SST-2: is a sentence of a film review positive or negative?

Source of the wording: Malladi et al. 2023 (arXiv 2305.17333), appendix E.
"""

from __future__ import annotations

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, label_of, text_of, tsv

OPTIONS = (" terrible", " great")
LABELS = {"0": 0, "1": 1}


def word(record: Record) -> list[Example]:
    """The sentence, before its verdict."""
    prompt = text_of(record, "sentence")
    return [Example(prompt, options=OPTIONS, label=label_of(record, LABELS), where=record.where)]


TASK = Task(
    name="sst2",
    load=PublicFiles(
        task="sst2",
        train=("train.tsv",),
        test=("dev.tsv",),
        read=tsv,
        word=word,
        source="GLUE's SST-2",
    ),
    invocation=" It was",
)
