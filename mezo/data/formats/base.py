"""`Format`, `Table` and `Record`: what a data file holds, whatever it is written in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One example of a file, as it stands there.

    Args:
        where: the file and the line, for error sentences.
        fields: {column: value}.
        problem: why it cannot be used, behind ``where`` a sentence without its full stop; it has no
            fields then.
    """

    where: str
    fields: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Restarting(Generic[T]):
    """Rows, or what is made of them, read when they are needed, anew by each iteration.

    Args:
        begin: returns a new iterator.
    """

    begin: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.begin()


@dataclass(frozen=True)
class Table:
    """A file's content.

    Args:
        columns: their names; none for an empty file.
        records: the examples and what is none, in the file's order; a list, or `Restarting` where
            they are streamed.
        label_names: {column: names of its labels}, for columns that say so themselves.
    """

    columns: tuple[str, ...]
    records: Iterable[Record]
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Format(Protocol):
    """One kind of data file."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What names of such files end in, as ".csv"."""
        ...

    def read(self, path: Path) -> Table:
        """Read a whole file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not of this format. A line that is not, where those behind it can be
                read, is a `Record` with a problem.
        """
        ...


@runtime_checkable
class Streamable(Format, Protocol):
    """One kind of data file that can be read row by row."""

    def stream(self, path: Path) -> Table:
        """Return a file's content; rows, and what is wrong with them, are as `read` has them."""
        ...
