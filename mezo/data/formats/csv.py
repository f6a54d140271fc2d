"""Comma-separated values with a line of column names."""

from __future__ import annotations

import csv
from pathlib import Path

from mezo.data.formats.base import Record, Table


class Csv:
    """See `mezo.data.formats.base.Format`. Values are texts, as they stand there."""

    suffixes: tuple[str, ...] = (".csv",)

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file."""
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            records = [Record(f"{path}:{reader.line_num}", row) for row in reader]
            return Table(tuple(reader.fieldnames or ()), records)
