"""Plain text: a line is an example."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mezo.data.formats.base import Record, Restarting, Table


class Txt:
    """See `mezo.data.formats.base.Streamable`. One column, text; blank lines are left out."""

    suffixes: tuple[str, ...] = (".txt",)

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file."""
        return Table(("text",), list(self._rows(path)))

    def stream(self, path: Path) -> Table:
        """Read a UTF-8 file line by line."""
        return Table(("text",), Restarting(lambda: self._rows(path)))

    def _rows(self, path: Path) -> Iterator[Record]:
        with path.open(encoding="utf-8-sig") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    yield Record(f"{path}:{i}", {"text": line.rstrip("\n")})
