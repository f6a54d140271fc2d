"""Parquet and Arrow, read by Hugging Face's `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo._inputs import one_line
from mezo.data.formats.base import Record, Restarting, Table


@dataclass(frozen=True)
class Columnar:
    """See `mezo.data.formats.base.Streamable`.

    Args:
        suffixes: of its files.
        builder: what `datasets` calls it.
    """

    suffixes: tuple[str, ...]
    builder: str

    def read(self, path: Path) -> Table:
        """Read a file."""
        table = self.stream(path)
        return Table(table.columns, list(table.records), table.label_names)

    def stream(self, path: Path) -> Table:
        """Read a file row by row."""
        import datasets

        try:
            if self.builder == "parquet":
                found: Any = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
            else:
                found = datasets.Dataset.from_file(str(path))  # mapped, not read
        except Exception as error:
            words = one_line(error)[:200]
            raise ValueError(
                f"data: {path} must be a {self.builder} file, got {type(error).__name__}: {words}; "
                "write it again."
            ) from error
        names = {
            column: tuple(feature.names)
            for column, feature in found.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }

        def rows() -> Iterator[Record]:
            for i, row in enumerate(found, 1):
                yield Record(f"{path}, row {i}", row)

        return Table(tuple(found.column_names), Restarting(rows), names)
