"""A process of its own for cases: what ends it, or hangs in it, costs one case and no rows.

The parent writes names of cases to the worker, line by line; the worker answers with lines of JSON.
An engine whose scheduler dies sends SIGQUIT to its parent, and a CUDA error stays with a process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

OPTION = "--worker"
# For a worker's imports and preparation, which compile on a GPU.
START_SECONDS = 90.0


def is_sticky(error: Exception) -> bool:
    """Whether a process can do nothing more on its GPU after this error."""
    words = ("CUDA error", "illegal memory access", "device-side assert", "launch failure")
    return any(word in str(error) for word in words)


def module_of(function: Callable[..., object]) -> str:
    """The module of a function, by its own name also where it is the main one."""
    name = function.__module__
    spec = sys.modules["__main__"].__spec__
    return spec.name if name == "__main__" and spec is not None else name


def close_input(process: subprocess.Popen[str], seconds: float) -> None:
    """Close a process's stdin, at which it ends; kill it where it does not in so many seconds."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Worker:
    """A process that measures cases, as its parent sees it.

    Args:
        module: is run with ``-m``; its `bench.runner.main` serves.
        arguments: of the command line.
    """

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, OPTION],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # Until it is ready; where it is lost instead, so is its first case.
        self._lost = self._next(START_SECONDS).get("lost")

    def measure(self, name: str, seconds: float) -> Message:
        """What the worker says of a case; "lost" says why it says nothing."""
        if self._lost is not None:
            return {"lost": self._lost, "never_ready": True}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
        except OSError:
            return {"lost": self._how_it_ended()}
        return self._next(seconds)

    def _next(self, seconds: float) -> Message:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return {"lost": f"took more than {seconds:.0f} s and was ended"}
        if line is None:
            return {"lost": self._how_it_ended()}
        message: Message = json.loads(line)
        return message

    def close(self) -> None:
        """End the process, at once if it does not end by itself."""
        close_input(self._process, 2.0)
        self._reader.join(2.0)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"


class Workers:
    """Measures cases in a worker; the next case gets a new one after a crash, or always.

    Args:
        module: as `Worker` has it.
        arguments: as `Worker` has them.
        is_fresh: whether each case has a worker of its own.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, is_fresh: bool) -> None:
        self._module, self._arguments, self._is_fresh = module, arguments, is_fresh
        self._worker: Worker | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start(self) -> Worker:
        """The worker of the next case, when it is ready."""
        if self._worker is None:
            self._worker = Worker(self._module, self._arguments)
        return self._worker

    def measure(self, name: str, seconds: float) -> Message:
        """What a worker says of a case, as `Worker.measure` does."""
        message = self.start().measure(name, seconds)
        if self._is_fresh or "lost" in message or message.get("is_broken"):
            self._close()
        return message

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class Channel:
    """A worker's end: case names in, messages out. The worker ends when its parent is gone."""

    def __init__(self) -> None:
        # What libraries print on stdout goes to stderr, so that it is no message.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._names: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def names(self) -> Iterator[str]:
        while True:
            yield self._names.get()

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def _read(self) -> None:
        for line in sys.stdin:
            self._names.put(line.removesuffix("\n"))
        os._exit(0)  # also out of a case that hangs
