"""Ctrl-C at a chosen moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest


def interrupted(call: Callable[[], object], *, after: float) -> None:
    """Run ``call`` and send SIGINT to this process after some seconds; it raises in here."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))

    def run() -> None:
        timer.start()
        try:
            call()
        finally:
            timer.join(10)

    with pytest.raises(KeyboardInterrupt):
        run()
