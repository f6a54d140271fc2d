"""Stages of a call on a GPU box: budgets, processes that are really gone, an archive that is there.

Only Python's own library is imported here, so that nothing that is missing on a box stops a call.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# A stage that would have less is not started.
LEAST_SECONDS = 5.0
# After SIGINT, which lets pytest print what it has.
GRACE_SECONDS = 6.0
# The most that a SIGKILL can lose.
RENEW_SECONDS = 3.0
# In the environment of a stage's processes, wherever they are in the tree.
MARK = "MEZO_GPU_STAGE"


@dataclass(frozen=True)
class Stage:
    """One command of a call.

    Args:
        name: of its log and of its row.
        seconds: its budget; it gets less where the call has less left.
        command: the program and its arguments.
        needs: stages that must have succeeded, else it is skipped.
        environment: variables of its own.
        beside: whether it runs beside the stages that follow, until one that waits for them.
        waits: whether it waits for the stages that run beside.
    """

    name: str
    seconds: float
    command: Sequence[str]
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False
    waits: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; ``status`` is "0" where it succeeded."""

    name: str
    status: str
    seconds: float
    at: float

    @property
    def is_good(self) -> bool:
        return self.status == "0"


class Archive:
    """A folder and its archive, which is replaced by a newer one in one move."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder, self.path = folder, path
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.renew()
        self._thread.start()

    def renew(self) -> None:
        """Write the archive anew; the one before stays until the new one is whole."""
        # The move is atomic on one file system only, so the new one is made beside the old one.
        new = self.path.with_name(self.path.name + ".new")
        with self._lock:
            with tarfile.open(new, "w:gz", compresslevel=4) as tar:
                for path in sorted(self.folder.rglob("*")):
                    # A stage may remove a file of its own in between.
                    if path.is_file():
                        add(tar, path, f"{self.folder.name}/{path.relative_to(self.folder)}")
            os.replace(new, self.path)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.renew()

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            self.renew()


def add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    """Add what a file holds now: one that grows meanwhile would break the archive."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), int(time.time())
    tar.addfile(info, io.BytesIO(content))


class Call:
    """Runs stages in order within the limit of the call."""

    def __init__(self, folder: Path, archive: Path, limit: float) -> None:
        self.folder = folder
        self.limit = limit
        self.outcomes: dict[str, Outcome] = {}
        self._started = time.monotonic()
        self._beside: list[threading.Thread] = []
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self.archive = Archive(folder, archive)

    @property
    def at(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._started

    def run(self, stages: Sequence[Stage], verdict: Callable[[], str]) -> bool:
        """Run the stages; returns whether all succeeded.

        Args:
            stages: in order.
            verdict: text made of the folder; it is written there after each stage.
        """
        try:
            for stage in stages:
                if stage.waits or any(need not in self.outcomes for need in stage.needs):
                    self._join()
                if stage.beside:
                    thread = threading.Thread(target=self._run, args=(stage, verdict), daemon=True)
                    self._beside.append(thread)
                    thread.start()
                else:
                    self._run(stage, verdict)
            self._join()
        finally:
            self.stop()
            self.archive.close()
        return all(outcome.is_good for outcome in self.outcomes.values())

    def stop(self) -> None:
        """End what runs; nothing starts any more."""
        self._stopped = True
        with self._lock:
            running = list(self._running.items())
        for name, process in running:
            end(process, self._mark(name))

    def _join(self) -> None:
        while self._beside:
            self._beside.pop().join()

    def _mark(self, name: str) -> str:
        return f"{MARK}={os.getpid()}.{name}"

    def _run(self, stage: Stage, verdict: Callable[[], str]) -> None:
        begun = self.at
        status = self._why_not(stage) or self._status(stage)
        outcome = Outcome(stage.name, status, round(self.at - begun, 1), round(self.at, 1))
        with self._lock:
            self.outcomes[stage.name] = outcome
            with (self.folder / "stages.jsonl").open("a") as file:
                file.write(json.dumps(vars(outcome)) + "\n")
            (self.folder / "verdict.txt").write_text(verdict())
        print(
            f"{outcome.name}: {outcome.status}, {outcome.seconds} s, at {outcome.at} s", flush=True
        )
        self.archive.renew()

    def _why_not(self, stage: Stage) -> str | None:
        """Why a stage does not start."""
        failed = [n for n in stage.needs if n in self.outcomes and not self.outcomes[n].is_good]
        if failed:
            return f"skipped: needs {', '.join(failed)}"
        if self._stopped or self._seconds(stage) < LEAST_SECONDS:
            return "no time left"
        return None

    def _seconds(self, stage: Stage) -> float:
        return min(stage.seconds, self.limit - self.at - GRACE_SECONDS)

    def _status(self, stage: Stage) -> str:
        seconds = self._seconds(stage)
        key, _, value = self._mark(stage.name).partition("=")
        with (self.folder / f"{stage.name}.log").open("wb") as log:
            try:
                # A group of its own, but the same session: whoever ends the call ends it, too.
                process = subprocess.Popen(
                    stage.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # setproctitle would write a process's title over its environment, the mark too.
                    env={**os.environ, **stage.environment, key: value, "SPT_NOENV": "1"},
                    process_group=0,
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                return f"did not start: {error.strerror}"
        with self._lock:
            self._running[stage.name] = process
        try:
            status = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            status = f"ended after {seconds:.0f} s"
        finally:
            end(process, self._mark(stage.name))
            with self._lock:
                del self._running[stage.name]
        return status


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a stage's process and all that it has started, wherever these are in the tree."""
    if process.poll() is None:
        signal_group(process, signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    signal_group(process, signal.SIGKILL)
    # An engine's scheduler outlives its parent and would keep the GPU's memory.
    for pid in marked(mark):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to what is left of a process's group."""
    with suppress(OSError):
        os.killpg(process.pid, number)


def marked(mark: str) -> list[int]:
    """The processes whose environment has the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in variables:
            found.append(int(entry.name))
    return found
