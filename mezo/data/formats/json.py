"""JSON: one object per line, or one list of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mezo._inputs import shown
from mezo.data.formats.base import Record, Restarting, Table


class Json:
    """See `mezo.data.formats.base.Streamable`. Values are as JSON has them; null is None."""

    suffixes: tuple[str, ...] = (".jsonl", ".json", ".ndjson")

    def read(self, path: Path) -> Table:
        """Read a UTF-8 file; ``where`` is the line, or the place in the list."""
        records = list(_records(path))
        columns = dict.fromkeys(name for record in records for name in record.fields)
        empty = dict.fromkeys(columns)
        filled = [r if r.problem else replace(r, fields={**empty, **r.fields}) for r in records]
        return Table(tuple(columns), filled)

    def stream(self, path: Path) -> Table:
        """Read a UTF-8 file line by line; the columns are those of the first good one."""
        first = next((record for record in _records(path) if not record.problem), None)
        columns = tuple(first.fields) if first else ()
        return Table(columns, Restarting(lambda: _records(path)))


def _records(path: Path) -> Iterator[Record]:
    """The entries of a file of lines, or of one list."""
    with path.open(encoding="utf-8-sig") as file:
        begin = next((line for line in file if line.strip()), "")
        file.seek(0)
        if begin.lstrip().startswith("["):
            for i, entry in enumerate(_whole(path, file.read()), 1):
                yield _record(f"{path}, entry {i}", entry)
            return
        for i, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{i}"
            try:
                yield _record(where, json.loads(line))
            except ValueError as error:
                yield Record(where, {}, _no_json(line, error))


def _record(where: str, entry: Any) -> Record:
    if isinstance(entry, dict):
        return Record(where, entry)
    return Record(
        where,
        {},
        f'must be an object as {{"text": "..."}}, got {shown(entry)}; write one object per line, '
        "or a list of objects",
    )


def _whole(path: Path, text: str) -> list[Any]:
    """The entries of one list."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"data: {path} {_no_json(text, error)}.") from error
    assert isinstance(found, list)
    return found


def _no_json(text: str, error: ValueError) -> str:
    return f"must be JSON, got {shown(text.strip())} ({error}); fix the line"
