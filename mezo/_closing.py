"""`closing`: an end for things that can fail to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def closing(close: Callable[[], Any]) -> Iterator[None]:
    """Call ``close`` at the end; what the block raised is not hidden by a failure of it."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            close()
        raise
    close()
