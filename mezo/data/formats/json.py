"""JSON: one object per line, or one list of objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mezo._inputs import shown
from mezo.data.formats.base import Record, Table


class Json:
    """See `mezo.data.formats.base.Format`. Values are as JSON has them; null is None."""

    suffixes: tuple[str, ...] = (".jsonl", ".json", ".ndjson")

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file; ``where`` is the line, or the place in the list."""
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "[":
            entries = [(f"{path}, entry {i}", row) for i, row in enumerate(_whole(path, text), 1)]
        else:
            entries = [
                (f"{path}:{i}", _parsed(f"{path}:{i}", line))
                for i, line in enumerate(text.split("\n"), 1)
                if line.strip()
            ]
        columns: dict[str, None] = {}
        for where, row in entries:
            if not isinstance(row, dict):
                raise ValueError(
                    f'data: {where} must be an object as {{"text": "..."}}, got {shown(row)}; '
                    "write one object per line, or a list of objects."
                )
            columns |= dict.fromkeys(row)
        return Table(
            tuple(columns), [Record(where, {**dict.fromkeys(columns), **r}) for where, r in entries]
        )


def _whole(path: Path, text: str) -> list[Any]:
    """The entries of one list."""
    found = _parsed(str(path), text)
    assert isinstance(found, list)
    return found


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"data: {where} must be JSON, got {shown(text.strip())} ({error}); fix the line."
        ) from error
