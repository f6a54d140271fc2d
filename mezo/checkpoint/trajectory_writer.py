"""The one who appends to a `trajectory.mezo`."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path

from mezo._inputs import require
from mezo.checkpoint.atomic import sync_directory
from mezo.checkpoint.trajectory import Form, Header, StepRecord, Trajectory, read

logger = logging.getLogger(__name__)


class TrajectoryWriter:
    """Appends to one file, which nobody else may do meanwhile.

    A record is handed to the operating system at once, so that it outlives this process; it is
    made durable in groups, by `sync` and every ``every`` records or ``seconds``.

    Args:
        path: the file, which has a header.
        trajectory: what it has.
        descriptor: open for appending, and locked.
        every: records after which they are made durable.
        seconds: time after which they are.
    """

    def __init__(
        self, path: Path, trajectory: Trajectory, descriptor: int, *, every: int, seconds: float
    ) -> None:
        self.path, self.trajectory = path, trajectory
        self._descriptor: int | None = descriptor
        self._every, self._seconds = every, seconds
        self._form = Form(trajectory.header.num_directions)
        self._end = trajectory.num_good_bytes
        self._next = len(trajectory.records)
        self._unsynced, self._last_sync = 0, time.monotonic()
        self._failure: OSError | None = None

    @classmethod
    def create(
        cls, path: str | Path, header: Header, *, every: int = 64, seconds: float = 1.0
    ) -> TrajectoryWriter:
        """Begin a file.

        Raises:
            ValueError: there is one already.
            OSError: it cannot be written.
        """
        path = Path(path)
        require(
            not path.exists(),
            f"trajectory: {path} must be new, got one that is there; go on with it, or remove it.",
        )
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(header.encoded())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
        return cls.append_to(path, every=every, seconds=seconds)

    @classmethod
    def append_to(
        cls, path: str | Path, *, every: int = 64, seconds: float = 1.0
    ) -> TrajectoryWriter:
        """Go on with a file; an end that is no whole record is cut off, and said in the log.

        Raises:
            ValueError: somebody else is writing, or see `read`; the file is as it was then.
            OSError: it cannot be written.
        """
        path = Path(path)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"trajectory: {path} must have one writer, got a second one; wait for the "
                    "training that is running, or choose another output directory."
                ) from error
            trajectory = read(path)
            if trajectory.cut is not None:
                logger.warning("%s It is cut off.", trajectory.cut)
                os.ftruncate(descriptor, trajectory.num_good_bytes)
                os.fsync(descriptor)
            return cls(path, trajectory, descriptor, every=every, seconds=seconds)
        except BaseException:
            os.close(descriptor)
            raise

    def append(self, record: StepRecord) -> None:
        """Add the next step.

        Raises:
            ValueError: it is not the next one.
            OSError: the disk does not take it; the file then ends with the record before.
        """
        self._check()
        assert self._descriptor is not None
        require(
            record.step == self._next,
            f"trajectory: the next record must be of step {self._next}, got {record.step}; append "
            "steps in order.",
        )
        data = self._form.encoded(record, self.trajectory.salt)
        try:
            written = os.write(self._descriptor, data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes were written")
        except BaseException as error:
            os.ftruncate(self._descriptor, self._end)
            if isinstance(error, OSError):
                raise OSError(
                    f"trajectory: {self.path} must take the record of step {record.step}, got "
                    f"{error}; make room, and go on with resume_from_checkpoint."
                ) from error
            raise
        self._end += len(data)
        self._next += 1
        self._unsynced += 1
        is_late = time.monotonic() - self._last_sync >= self._seconds
        if self._unsynced >= self._every or is_late:
            self.sync()

    def sync(self) -> None:
        """Make every record so far durable.

        Raises:
            OSError: that failed. What the system has of the file since the last time is not to be
                trusted then, so that every later call fails, too.
        """
        self._check()
        assert self._descriptor is not None
        self._last_sync = time.monotonic()
        if not self._unsynced:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._failure = OSError(
                f"trajectory: {self.path} must be made durable, got {error}; look after the disk, "
                "and go on with resume_from_checkpoint."
            )
            raise self._failure from error
        self._unsynced = 0

    def close(self) -> None:
        """Make all records durable and let others write; closing twice is fine."""
        if self._descriptor is None:
            return
        try:
            if self._failure is None:
                self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        require(
            self._descriptor is not None,
            f"trajectory: {self.path} must be open, got a closed one; open it again.",
        )
