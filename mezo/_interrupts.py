"""Keeps Ctrl-C out of changes that must happen as a whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put a Ctrl-C (and a SIGTERM that Python handles) off to the end of the block.

    Python raises KeyboardInterrupt between any two statements, also between a kernel's update of
    the weights and the note that it was applied. Only the main thread is ever interrupted, so
    there is nothing to do in others. Cost: a few calls of `signal.signal`, microseconds.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in _SIGNALS}
        # Others are ignored, the system's own, or installed by C code: no exception comes of them.
        handlers = {number: handler for number, handler in known.items() if callable(handler)}
    arrived: list[tuple[int, Any]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda signum, frame: arrived.append((signum, frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signum, frame in arrived[:1]:
            handlers[signum](signum, frame)
