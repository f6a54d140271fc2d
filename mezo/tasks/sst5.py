"""SST-5: how positive is a sentence of a film review, in five steps?

Source of the wording: Gao et al. 2021 (LM-BFF, arXiv 2012.15723), whose words and
template the MeZO paper uses.
"""

from __future__ import annotations

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, label_of, labelled_lines, text_of

OPTIONS = (" terrible", " bad", " okay", " good", " great")
LABELS = {str(i): i for i in range(5)}


def word(record: Record) -> list[Example]:
    """The sentence, before its verdict."""
    prompt = text_of(record, "sentence")
    return [Example(prompt, options=OPTIONS, label=label_of(record, LABELS), where=record.where)]


TASK = Task(
    name="sst5",
    load=PublicFiles(
        task="sst5",
        train=(
            "train.csv",
            "train.tsv",
        ),
        test=(
            "test.csv",
            "test.tsv",
        ),
        read=labelled_lines,
        word=word,
        source="SST-5 as rows of label (0 to 4) and sentence",
    ),
    invocation=" It was",
)
