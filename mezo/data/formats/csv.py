"""Comma- or tab-separated values with a line of column names."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mezo.data.formats.base import Record, Restarting, Table

_REST = "\0more"  # the name under which csv puts values that have no column


@dataclass(frozen=True)
class Csv:
    """See `mezo.data.formats.base.Streamable`. Values are texts, as they stand there.

    Args:
        suffixes: of its files.
        delimiter: between values.
    """

    suffixes: tuple[str, ...] = (".csv",)
    delimiter: str = ","

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file; ``where`` is the line that a row ends on."""
        return Table(self._columns(path), list(self._rows(path)))

    def stream(self, path: Path) -> Table:
        """Read a UTF-8 file row by row."""
        return Table(self._columns(path), Restarting(lambda: self._rows(path)))

    def _columns(self, path: Path) -> tuple[str, ...]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = tuple(csv.DictReader(file, delimiter=self.delimiter).fieldnames or ())
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"data: {path} must have columns of different names, got {name!r} twice; "
                    "rename one."
                )
        return names

    def _rows(self, path: Path) -> Iterator[Record]:
        csv.field_size_limit(2**31 - 1)  # articles are longer than the default
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Strict: a quote that is never closed would make one value of all lines that follow.
            reader = csv.DictReader(file, delimiter=self.delimiter, restkey=_REST, strict=True)
            while True:
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    raise ValueError(
                        f"data: {path}:{reader.line_num} must be values between "
                        f"{self.delimiter!r}, got a line that cannot be read ({error}); put values "
                        "with quotes into quotes, and write a quote in them twice."
                    ) from error
                if row is None:
                    return
                where = f"{path}:{reader.line_num}"
                expected, more = len(reader.fieldnames or ()), row.pop(_REST, None) or ()
                found = expected + len(more) - list(row.values()).count(None)  # type: ignore[arg-type]
                if found == expected:
                    yield Record(where, row)
                    continue
                yield Record(
                    where,
                    {},
                    f"must have {expected} values, got {found}; fix the line, and quote values "
                    "that hold the delimiter",
                )
