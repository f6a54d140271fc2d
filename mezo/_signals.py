"""Puts off Ctrl-C in lines that must happen together, and keeps it out of SGLang's processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Deliver a SIGINT that arrives inside only when the block has ended.

    Python raises KeyboardInterrupt between any two instructions of the main thread, for example
    behind an update and before the line that says it was made. Other threads never get it, and
    nothing is done there.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if is_main else None
    if not callable(previous):  # ignored, default, or not Python's
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            previous(*caught[-1])


@contextmanager
def finishing(say: Callable[[str], None]) -> Iterator[None]:
    """Put off the first SIGINT until the block has ended; a second one stops it at once.

    Args:
        say: told what is going on, when the first one comes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if is_main else None
    if not callable(previous):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        caught.append((number, frame))
        if len(caught) > 1:
            signal.signal(signal.SIGINT, previous)
            previous(number, frame)
        else:
            say("finishing the step; a second signal stops at once")

    signal.signal(signal.SIGINT, put_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if len(caught) == 1:
            previous(*caught[0])


def leave_interrupts_to_the_parent() -> None:
    """Ignore SIGINT in this process, one of SGLang's.

    A terminal sends Ctrl-C to all processes in it. The caller may catch it, to save what was
    trained; a scheduler that dies of it loses that, and ends the caller. SGLang's processes end
    when the caller does.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def sigterm_interrupts(arrived: list[int]) -> Iterator[None]:
    """Let SIGTERM (a batch system's, `docker stop`) end a training as Ctrl-C does: saved."""

    def interrupt(signum: int, frame: object) -> None:
        arrived.append(signum)
        if not callable(signal.getsignal(signal.SIGINT)):  # ignored: started in the background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)  # where Ctrl-C is put off, so is this

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
