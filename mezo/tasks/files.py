"""Reads the public files of data sets, and holds out a dev split."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo._inputs import require, shown
from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.data.load import load_records
from mezo.tasks.base import Splits

_NUM_DEV = 500
Read = Callable[[Path], Iterator[Record]]


@dataclass(frozen=True)
class PublicFiles:
    """Loads a task from a directory with the data set's public files.

    Args:
        task: its name, for error sentences.
        train: names that the training file may have.
        test: names that the public validation (or test) file may have.
        read: yields a file's records.
        word: makes one record an example or several; none for a row that is left out.
        source: which data set that is, for error sentences.
    """

    task: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Read
    word: Callable[[Record], Sequence[Example]]
    source: str

    def __call__(self, path: Path | None) -> Splits:
        """Read both files; dev is held out of the training file.

        Raises:
            ValueError: no directory, a file that is not there, or a bad row.
        """
        names = f"{' or '.join(self.train)} and {' or '.join(self.test)}"
        require(
            path is not None,
            f"{self.task}: data must be a directory with {names} of {self.source}, got none; "
            "download them and pass the directory with --data.",
        )
        assert path is not None
        train = self._examples(Path(path), self.train, names)
        test = self._examples(Path(path), self.test, names)
        tested = {_unit(example) for example in test}
        train, dev = held_out([e for e in train if _unit(e) not in tested])
        return Splits(train=train, dev=dev, test=test)

    def _examples(self, folder: Path, accepted: tuple[str, ...], names: str) -> list[Example]:
        found = [folder / name for name in accepted if (folder / name).is_file()]
        require(
            bool(found),
            f"{self.task}: {folder} must be a directory with {names} of {self.source}, got no "
            f"{' or '.join(accepted)}; pass the directory that has them with --data.",
        )
        examples = [e for record in self.read(found[0]) for e in self.word(record)]
        require(
            bool(examples),
            f"{self.task}: {found[0]} must have examples, got none; download it again.",
        )
        return examples


def _unit(example: Example) -> str:
    """What may not be torn apart by a split."""
    return example.group or str(example.prompt)


def held_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split off a dev set: 500 examples, at most a fifth, chosen with ``random.Random(0)``.

    Examples of one group, and those with the same prompt, stay together.

    Returns:
        What stays for training, and dev, both in the file's order.
    """
    units: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        units.setdefault(_unit(example), []).append(i)
    order = list(units.values())
    random.Random(0).shuffle(order)
    limit = min(_NUM_DEV, len(examples) // 5)
    chosen: set[int] = set()
    for places in order:
        if len(chosen) + len(places) <= limit:
            chosen.update(places)
    train = [e for i, e in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


def jsonl(path: Path) -> Iterator[Record]:
    """Yield the objects of a file with one JSON object per line, as they are needed.

    Raises:
        ValueError: a line is none.
    """
    yield from load_records(path, streaming=True).rows


def json_file(path: Path) -> dict[str, object]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    require(
        isinstance(found, dict),
        f"{path} must be a JSON object, got another content; download it again.",
    )
    return dict(found)


def tsv(path: Path) -> Iterator[Record]:
    """Yield the rows of a GLUE file: tabs, a line of column names, quotes mean nothing.

    Raises:
        ValueError: a row has another number of columns.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            require(
                None not in row and None not in row.values(),
                f"{where} must have the columns {reader.fieldnames}, got another number of them; "
                "fix the row.",
            )
            yield Record(where, row)


def labelled_lines(path: Path) -> Iterator[Record]:
    """Yield label and sentence of a csv or tsv file, with or without a line of column names."""
    with path.open(encoding="utf-8", newline="") as file:
        is_tsv = path.suffix == ".tsv"
        reader = csv.reader(file, delimiter="\t") if is_tsv else csv.reader(file)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and not (reader.line_num == 1 and row[0].strip().lower() == "label"):
                require(
                    len(row) == 2,
                    f"{where} must be label and sentence, got {len(row)} columns; fix the row.",
                )
                yield Record(where, {"label": row[0].strip(), "sentence": row[1]})


def text_of(record: Record, column: str) -> str:
    """Return a column's text without blanks around it.

    Raises:
        ValueError: it is missing, empty or no text.
    """
    value = record.fields.get(column)
    require(
        isinstance(value, str) and bool(value.strip()),
        f"{record.where}: {column} must be a text, got {shown(value)}; fix the row.",
    )
    return str(value).strip()


def label_of(record: Record, labels: Mapping[Any, int], column: str = "label") -> int:
    """Return the option's index that a label stands for.

    Raises:
        ValueError: it is none of ``labels``.
    """
    value = record.fields.get(column)
    is_known = isinstance(value, (str, int)) and value in labels
    require(
        is_known,
        f"{record.where}: {column} must be one of {list(labels)}, got {shown(value)}; fix the row.",
    )
    return labels[value]


def inner(record: Record, column: str) -> Record:
    """Return the object that a column holds, as a record.

    Raises:
        ValueError: it holds none.
    """
    value = record.fields.get(column)
    require(
        isinstance(value, dict),
        f"{record.where}: {column} must be an object, got {shown(value)}; fix the row.",
    )
    return Record(f"{record.where}, {column}", value)  # type: ignore[arg-type]


def items(record: Record, column: str) -> list[Record]:
    """Return the objects that a column's list holds, as records.

    Raises:
        ValueError: it holds no list of objects.
    """
    value = record.fields.get(column)
    require(
        isinstance(value, list) and all(isinstance(item, dict) for item in value),
        f"{record.where}: {column} must be a list of objects, got {shown(value)}; fix the row.",
    )
    return [Record(f"{record.where}, {column}[{i}]", v) for i, v in enumerate(value or ())]
