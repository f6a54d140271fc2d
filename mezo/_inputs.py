"""Users' values as plain Python: what NumPy, torch and pandas hold, as ints, floats and lists."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

_SHOWN = 60  # characters of a value in an error sentence


def require(is_ok: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``is_ok``."""
    if not is_ok:
        raise ValueError(message)


def plain(value: Any) -> Any:
    """What an array, a tensor or a Series holds, as Python scalar or list; else ``value``."""
    tolist = getattr(value, "tolist", None)
    return value if tolist is None or isinstance(value, type) else tolist()


def number(value: Any) -> int | float | None:
    """A real number as int or float; None for anything else, texts and bools included."""
    value = plain(value)
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def as_list(value: Any) -> list[Any] | None:
    """A new list of what a list, a tuple, an array, a tensor, a Series or an iterator holds.

    Returns:
        None for what is no list: one text or scalar, None, a set (it has no order), a mapping, a
        table (going through one gives its column names).
    """
    value = plain(value)
    if isinstance(value, (str, bytes, Mapping, Set)) or hasattr(value, "keys"):
        return None
    return list(value) if isinstance(value, Iterable) else None


def shown(value: Any) -> str:
    """A value in an error sentence: short, on one line; of arrays and tensors only the shape."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) > 0:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {_short(list(value))}"
    value = plain(value)
    # repr of anything else is long and tells little: a model, a generator.
    is_known = value is None or isinstance(value, (str, bytes, numbers.Number, list, tuple, Set))
    return _short(value) if is_known else type(value).__name__


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def nearest(name: object, names: Iterable[str], *, alike: float = 0.6) -> str | None:
    """The name that a misspelt one is most like; None where none is like it by that ratio."""
    if not isinstance(name, str):
        return None
    found = difflib.get_close_matches(name, list(names), 1, alike)
    return found[0] if found else None


def one_line(error: object) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())


def checked_number(
    what: str, value: Any, is_ok: Callable[[float], bool], expected: str, remedy: str
) -> int | float:
    """Return ``value`` as a finite int or float, or raise.

    Args:
        what: "who: field", as the sentence begins.
        value: from the user; NumPy scalars and 0-d tensors are numbers, texts are not.
        is_ok: says whether a finite number will do.
        expected: what it must be, for the sentence.
        remedy: what to do, for the sentence.

    Raises:
        ValueError: it is no finite number, or not the right one.
    """
    found = number(value)
    try:
        is_fine = found is not None and math.isfinite(found) and is_ok(found)
    except OverflowError:  # an int beyond floats
        is_fine = False
    require(is_fine, f"{what} must be {expected}, got {shown(value)}; {remedy}.")
    assert found is not None
    return found


def checked_integer(
    what: str, value: Any, low: int, high: int | None, expected: str, remedy: str
) -> int:
    """Return ``value`` as an int in ``low .. high - 1`` (``high`` may be None), or raise.

    Raises:
        ValueError: it is no integer (bools and 2.0 are none), or out of range.
    """
    found = number(value)
    is_fine = isinstance(found, int) and low <= found and (high is None or found < high)
    require(is_fine, f"{what} must be {expected}, got {shown(value)}; {remedy}.")
    assert isinstance(found, int)
    return found


def checked_choice(what: str, value: Any, choices: tuple[str, ...], remedy: str) -> str:
    """Return ``value``, which must be one of ``choices``, or raise ValueError."""
    require(
        isinstance(value, str) and value in choices,
        f"{what} must be one of {choices}, got {shown(value)}; {remedy}.",
    )
    return str(value)
