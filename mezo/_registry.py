"""`Registry`: things of one kind by name. Users add one by a row."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

from mezo._inputs import nearest, require, shown

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name, in the order of their rows; an unknown name is answered with the nearest.

    Args:
        what: the kind, as error sentences call it.
        rows: {name: the thing, or where it is as "module:attribute"}; that module is imported when
            the thing is first used.

    Example:
        >>> colours = Registry("colour", {"red": 1})
        >>> colours.register("green", 2)
        >>> colours["green"]
        2
    """

    def __init__(self, what: str, rows: Mapping[str, T | str]) -> None:
        self._what = what
        self._rows: dict[str, T | str] = dict(rows)

    def __getitem__(self, name: str) -> T:
        row = self._rows[self.check(name)]
        if isinstance(row, str):
            module, _, attribute = row.partition(":")
            row = self._rows[name] = cast(T, getattr(importlib.import_module(module), attribute))
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def check(self, name: object, who: str = "") -> str:
        """Return ``name`` if it is one of ours.

        Args:
            name: from the user.
            who: "caller: ", as the sentence begins.

        Raises:
            ValueError: it is not; the sentence has all names and the nearest one.
        """
        if isinstance(name, str) and name in self._rows:
            return name
        raise ValueError(
            f"{who}{self._what} must be one of: {', '.join(self._rows)}; got {shown(name)}, "
            f"use {nearest(name, self._rows) or next(iter(self._rows))!r}."
        )

    def register(self, name: str, thing: T) -> None:
        """Add a thing, in this process.

        SGLang's processes import the main script's module again: register at its top level, not
        under ``if __name__ == "__main__"``, what they need too (objectives, estimators,
        optimisers).

        Raises:
            ValueError: the name is in use.
        """
        require(
            name not in self._rows,
            f"register: {self._what} {name!r} must be a new name, got one that is in use; choose "
            "another name.",
        )
        self._rows[name] = thing

    def unregister(self, name: str) -> None:
        """Take a thing out again.

        Raises:
            ValueError: there is none of that name.
        """
        del self._rows[self.check(name)]
