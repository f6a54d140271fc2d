"""The kinds of data files. To add one, write its module and a row here."""

from __future__ import annotations

from pathlib import Path

from mezo._registry import Registry
from mezo.data.formats.base import Format, Record, Table
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

__all__ = ["FORMATS", "Format", "Record", "Table", "read"]


def read(path: Path) -> Table:
    """Read a data file in the format that its name says; one of another name is read as CSV.

    Raises:
        OSError, ValueError: see `Format.read`.
    """
    for name in FORMATS:
        if path.suffix.lower() in FORMATS[name].suffixes:
            return FORMATS[name].read(path)
    return FORMATS[_DEFAULT].read(path)
