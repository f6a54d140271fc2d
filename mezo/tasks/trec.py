"""TREC: what kind of thing does a question ask for?

Source of the wording: the label words of Gao et al. 2021 (LM-BFF, arXiv
2012.15723), put behind the question for a causal model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks.base import Task
from mezo.tasks.files import PublicFiles, label_of, labelled_lines, text_of

OPTIONS = (" description", " entity", " expression", " human", " location", " number")
_NAMES = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
LABELS = {**{str(i): i for i in range(6)}, **{name: i for i, name in enumerate(_NAMES)}}


def read(path: Path) -> Iterator[Record]:
    """Yield label and sentence, also of the original lines, as "DESC:manner How ...".

    Numbers are those of the files of LM-BFF, in the order of `OPTIONS`.
    """
    if path.suffix in (".csv", ".tsv"):
        yield from labelled_lines(path)
        return
    # The original files are Latin-1.
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), 1):
        if line.strip():
            kind, _, sentence = line.partition(" ")
            fields = {"label": kind.partition(":")[0], "sentence": sentence}
            yield Record(f"{path}:{number}", fields)


def word(record: Record) -> list[Example]:
    """The question, before its kind."""
    prompt = text_of(record, "sentence")
    return [Example(prompt, options=OPTIONS, label=label_of(record, LABELS), where=record.where)]


TASK = Task(
    name="trec",
    load=PublicFiles(
        task="trec",
        train=(
            "train.csv",
            "train.tsv",
            "train_5500.label",
        ),
        test=(
            "test.csv",
            "test.tsv",
            "TREC_10.label",
        ),
        read=read,
        word=word,
        source="TREC's question classes",
    ),
    invocation=" It asks for a",
)
