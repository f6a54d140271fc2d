"""Records on the disk: JSON files, and logs of one JSON object per line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from mezo.checkpoint.atomic import replace_file


def write_json(path: Path, data: Any) -> Path:
    """Write JSON, sorted and indented; the file is either the old one or the whole new one.

    Args:
        path: the file; its directory is made.
        data: what `json` accepts, and also dataclasses, paths, and numbers that are not finite,
            which become null because JSON has no word for them.

    Returns:
        ``path``.

    Raises:
        TypeError: a value that JSON cannot hold; the file is left as it was.
    """
    text = json.dumps(plain(data), indent=2, sort_keys=True, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())
    return path


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's types; numbers that are not finite become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is no such file, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, without lines that were not written to their end.

    Raises:
        OSError: it cannot be read; a file that is not there has no records.
    """
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"


class JsonLines:
    """A log with one JSON object per line; each line is on its way to the disk when it is written.

    Args:
        path: the file.
        kept: records that it begins with; whatever else a file there holds is dropped.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path, kept: Sequence[Mapping[str, Any]] = ()) -> None:
        if kept:
            replace_file(path, "".join(map(_line, kept)).encode())
        self._file: TextIO | None = path.open("a" if kept else "w", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line. The first line that fails closes the log; later ones are dropped.

        Raises:
            OSError: the line could not be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; every line was flushed."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
