"""The kinds of data files. To add one, write its module and a row here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mezo._registry import Registry
from mezo.data.formats.base import Format, Record, Restarting, Streamable, Table
from mezo.data.formats.csv import Csv
from mezo.data.formats.json import Json
from mezo.data.formats.tables import Columnar
from mezo.data.formats.txt import Txt

FORMATS: Registry[Format] = Registry(
    "format",
    {
        "csv": Csv(),
        "tsv": Csv((".tsv",), "\t"),
        "json": Json(),
        "txt": Txt(),
        "parquet": Columnar((".parquet",), "parquet"),
        "arrow": Columnar((".arrow",), "arrow"),
    },
)
_DEFAULT = "csv"  # of files whose names say nothing

__all__ = ["FORMATS", "Format", "Record", "Restarting", "Streamable", "Table", "read"]


def read(path: Path, *, streaming: bool = False, keeps_bad: bool = False) -> Table:
    """Read a data file in the format that its name says; one of another name is read as CSV.

    Args:
        path: the file.
        streaming: whether to read rows only when they are needed.
        keeps_bad: whether to return rows with a problem; else they are errors.

    Raises:
        OSError, ValueError: see `Format.read`; ValueError: a format that cannot be streamed, or a
            row with a problem; of a stream it comes when the row is read.
    """
    suffix = path.suffix.lower()
    name = next((name for name in FORMATS if suffix in FORMATS[name].suffixes), _DEFAULT)
    found = FORMATS[name]
    if streaming and not isinstance(found, Streamable):
        raise ValueError(
            f"data: a file to be streamed must be of a format that has stream(), got "
            f"{path.name} ({name}); leave streaming out."
        )
    table = found.stream(path) if streaming else found.read(path)  # type: ignore[attr-defined]
    if keeps_bad:
        return table
    records = table.records
    if streaming:
        return replace(table, records=Restarting(lambda: map(_good, records)))
    return replace(table, records=[_good(record) for record in records])


def _good(record: Record) -> Record:
    """The record, unless it has a problem."""
    if record.problem:
        raise ValueError(f"data: {record.where} {record.problem}.")
    return record
