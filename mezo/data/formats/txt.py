"""Plain text: a line is an example."""

from __future__ import annotations

from pathlib import Path

from mezo.data.formats.base import Record, Table


class Txt:
    """See `mezo.data.formats.base.Format`. The one column is text; blank lines are left out."""

    suffixes: tuple[str, ...] = (".txt",)

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file."""
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return Table(
            ("text",),
            [Record(f"{path}:{i}", {"text": x}) for i, x in enumerate(lines, 1) if x.strip()],
        )
