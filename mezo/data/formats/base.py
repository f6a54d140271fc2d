"""`Format`, `Table` and `Record`: what a data file holds, whatever it is written in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Record:
    """One example of a file, as it stands there.

    Args:
        where: the file and the line, for error sentences.
        fields: {column: value}.
    """

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A file's content.

    Args:
        columns: their names; none for an empty file.
        records: the examples, in the file's order.
    """

    columns: tuple[str, ...]
    records: list[Record]


class Format(Protocol):
    """One kind of data file.

    Attributes:
        suffixes: what names of such files end in, as ".csv".
    """

    suffixes: tuple[str, ...]

    def read(self, path: Path) -> Table:
        """Read a whole file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not of this format; the sentence names the line.
        """
        ...
