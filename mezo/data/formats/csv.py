"""Comma- or tab-separated values with a line of column names."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from mezo.data.formats.base import Record, Table

_REST = "\0more"  # the name under which csv puts values that have no column


@dataclass(frozen=True)
class Csv:
    """See `mezo.data.formats.base.Format`. Values are texts, as they stand there; none is missing.

    Args:
        suffixes: of its files.
        delimiter: between values.
    """

    suffixes: tuple[str, ...] = (".csv",)
    delimiter: str = ","

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file."""
        csv.field_size_limit(2**31 - 1)  # articles are longer than the default
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=self.delimiter, restkey=_REST)
            records = []
            for row in reader:
                where = f"{path}:{reader.line_num}"
                expected, more = len(reader.fieldnames or ()), row.pop(_REST, None) or ()
                found = expected + len(more) - list(row.values()).count(None)  # type: ignore[arg-type]
                if found != expected:
                    raise ValueError(
                        f"data: {where} must have {expected} values, got {found}; fix the line, "
                        "and quote values that hold the delimiter."
                    )
                records.append(Record(where, dict(row)))
            return Table(tuple(reader.fieldnames or ()), records)
