"""JSON: one object per line, or one list of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezo._inputs import shown
from mezo.data.formats.base import Record, Restarting, Table


class Json:
    """See `mezo.data.formats.base.Streamable`. Values are as JSON has them; null is None."""

    suffixes: tuple[str, ...] = (".jsonl", ".json", ".ndjson")

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file; ``where`` is the line, or the place in the list."""
        records = list(self._rows(path))
        columns = dict.fromkeys(name for record in records for name in record.fields)
        empty = dict.fromkeys(columns)
        return Table(tuple(columns), [Record(r.where, {**empty, **r.fields}) for r in records])

    def stream(self, path: Path) -> Table:
        """Read a UTF-8 file line by line; the columns are those of the first one."""
        first = next(self._rows(path), None)
        columns = tuple(first.fields) if first else ()
        return Table(columns, Restarting(lambda: self._rows(path)))

    def _rows(self, path: Path) -> Iterator[Record]:
        for where, row in _entries(path):
            if not isinstance(row, dict):
                raise ValueError(
                    f'data: {where} must be an object as {{"text": "..."}}, got {shown(row)}; '
                    "write one object per line, or a list of objects."
                )
            yield Record(where, row)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, entry) of a file of lines, or of one list."""
    with path.open(encoding="utf-8-sig") as file:
        begin = next((line for line in file if line.strip()), "")
        file.seek(0)
        if begin.lstrip().startswith("["):
            text = file.read()
            for i, entry in enumerate(_whole(path, text), 1):
                yield f"{path}, entry {i}", entry
            return
        for i, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{i}"
                yield where, _parsed(where, line)


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
