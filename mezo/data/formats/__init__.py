"""The kinds of data files. To add one, write its module and a row here."""

from __future__ import annotations

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


def read(path: Path, *, streaming: bool = False) -> Table:
    """Read a data file in the format that its name says; one of another name is read as CSV.

    Args:
        path: the file.
        streaming: whether to read rows only when they are needed.

    Raises:
        OSError, ValueError: see `Format.read`; ValueError: a format that cannot be streamed.
    """
    suffix = path.suffix.lower()
    name = next((name for name in FORMATS if suffix in FORMATS[name].suffixes), _DEFAULT)
    found = FORMATS[name]
    if not streaming:
        return found.read(path)
    if not isinstance(found, Streamable):
        raise ValueError(
            f"data: a file to be streamed must be of a format that has stream(), got "
            f"{path.name} ({name}); leave streaming out."
        )
    return found.stream(path)
