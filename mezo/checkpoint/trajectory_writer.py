"""Appending to trajectory.mezo: one writer per file, a record per write, fsync in groups."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from mezo._inputs import require
from mezo.checkpoint.trajectory import (
    Header,
    StepRecord,
    Trajectory,
    decode,
    encode_header,
    encode_record,
    header_crc,
)

logger = logging.getLogger(__name__)
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC


class TrajectoryWriter:
    """Appends the steps of a run to its file, which nobody else may write until it is closed.

    Made by `create` or `append_to`; for one thread. A forked child has it closed.

    Attributes:
        path: the file.
        trajectory: what was in the file when it was opened.
    """

    def __init__(
        self, fd: int, path: Path, trajectory: Trajectory, crc: int, every: int, seconds: float
    ) -> None:
        self.path = path
        self.trajectory = trajectory
        self._fd: int | None = fd
        self._crc, self._every, self._seconds = crc, every, seconds
        self._failure: str | None = None
        self._num_records = self._num_synced = len(trajectory.records)
        self._synced_at = time.monotonic()
        _open_writers.add(self)

    @classmethod
    def create(
        cls, path: str | Path, header: Header, *, every: int = 64, seconds: float = 1.0
    ) -> TrajectoryWriter:
        """Make a new file with a header; it is there as a whole, durable and locked, or not at all.

        Args:
            path: the file, in a directory that is there.
            header: what the run is started with.
            every: an append makes all records durable when so many are not.
            seconds: ... or when so much time has passed since they last were.

        Raises:
            ValueError: the file is there, somebody else is making it, or JSON cannot hold the
                header.
            OSError: it cannot be written; nothing is left of it.
        """
        path, head = Path(path), encode_header(header)
        temporary = path.with_name(f"{path.name}.tmp")
        _require_new(path)
        remedy = "make room there, or choose another output"
        with _explained("created", path, remedy), _opened(temporary, os.O_CREAT) as fd:
            _lock(fd, path)  # a lock belongs to the file, whatever its name
            _require_new(path)  # by now another run may have made it
            if not os.path.samestat(os.fstat(fd), os.stat(temporary)):
                raise FileExistsError(errno.EEXIST, "another run that makes it")
            try:
                os.ftruncate(fd, 0)  # a killed process may have left some of it
                _write(fd, head)
                os.fsync(fd)
                os.rename(temporary, path)
                _sync_directory(path.parent)
            except BaseException:
                for name in (temporary, path):
                    name.unlink(missing_ok=True)
                raise
            return cls(fd, path, decode(head, path), header_crc(head), every, seconds)

    @classmethod
    def append_to(
        cls, path: str | Path, *, every: int = 64, seconds: float = 1.0
    ) -> TrajectoryWriter:
        """Open a file to go on behind its last good record; a torn end is cut, and the log says so.

        Args:
            path: the file.
            every: as of `create`.
            seconds: as of `create`.

        Raises:
            ValueError: somebody else writes it, or it is no good file: see
                `mezo.checkpoint.trajectory.read`. It is as it was.
            OSError: it cannot be read or written.
        """
        path = Path(path)
        remedy = "see that it is there, on a disk that works"
        with _explained("opened", path, remedy), _opened(path) as fd:
            _lock(fd, path)
            # After an fsync that failed, memory may hold records that the disk does not have:
            # what is read must come from the disk.
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with open(fd, "rb", closefd=False) as file:
                raw = file.read()
            trajectory = decode(raw, path)
            if trajectory.cut is not None:
                logger.warning("%s and are cut", trajectory.cut)
                os.ftruncate(fd, trajectory.num_good_bytes)
            size = trajectory.header.record_size * len(trajectory.records)
            crc = header_crc(raw[: trajectory.num_good_bytes - size])
            return cls(fd, path, trajectory, crc, every, seconds)

    @property
    def num_records(self) -> int:
        """Records in the file, which is the number of the next step."""
        return self._num_records

    def append(self, record: StepRecord) -> None:
        """Write a record, and make all of them durable if it is time.

        Args:
            record: of the next step.

        Raises:
            ValueError: another step's record, or values that a record cannot hold.
            OSError: it could not be written, and the file ends with the record before; a later
                call may succeed. Or records could not be made durable, now or before: then
                nothing more is written.
            RuntimeError: the writer is closed.
        """
        fd = self._usable()
        require(
            record.step == self._num_records,
            f"trajectory: the next record must be of step {self._num_records}, got "
            f"{record.step}; append every step once, in order.",
        )
        data = encode_record(record, self.trajectory.header.num_directions, self._crc)
        with _explained("written", self.path, "make room there and append the record again"):
            try:
                _write(fd, data)
                self._num_records += 1
            except BaseException:
                self._cut_back(fd)
                raise
        is_late = time.monotonic() - self._synced_at >= self._seconds
        if is_late or self._num_records - self._num_synced >= self._every:
            self.sync()

    def sync(self) -> None:
        """Make every record so far durable: when this returns, a power loss does not lose it.

        Raises:
            OSError: that failed, now or before.
            RuntimeError: the writer is closed.
        """
        fd, count = self._usable(), self._num_records
        if count > self._num_synced:
            remedy = "look after the disk, then open the run again"
            with _explained("made durable", self.path, remedy):
                try:
                    os.fsync(fd)
                except OSError:
                    # A second fsync would succeed without the records that the first one lost.
                    self._failure = "records that could not be made durable"
                    raise
        self._num_synced, self._synced_at = count, time.monotonic()

    def close(self) -> None:
        """Make every record durable and let others write the file; again: nothing.

        Raises:
            OSError: records could not be made durable; the file is closed.
        """
        if self._fd is None:
            return
        try:
            if self._failure is None:
                self.sync()
        finally:
            self._drop()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._drop()

    def _usable(self) -> int:
        """The open file, or raise."""
        if self._fd is None:
            raise RuntimeError(
                f"trajectory: the writer of {self.path} must be open, got a closed one; open the "
                "file again with TrajectoryWriter.append_to."
            )
        if self._failure is not None:
            raise OSError(
                errno.EIO,
                f"trajectory: {self.path} must be whole, got {self._failure}; look after the disk, "
                "then open the run again",
            )
        return self._fd

    def _cut_back(self, fd: int) -> None:
        """Take away what a failed write has left behind the last good record."""
        size = self.trajectory.header.record_size
        new = self._num_records - len(self.trajectory.records)
        try:
            os.ftruncate(fd, self.trajectory.num_good_bytes + new * size)
        except OSError:
            self._failure = "part of a record that could not be taken away"

    def _drop(self) -> None:
        # Only close: to unlock would unlock it for the process that this one was forked from.
        fd, self._fd = getattr(self, "_fd", None), None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)


def remove(path: str | Path) -> None:
    """Remove a file that nobody is writing, whatever is in it; nothing where there is none.

    Raises:
        ValueError: somebody is writing it.
        OSError: it cannot be removed.
    """
    path = Path(path)
    if not path.exists():
        return
    with _explained("removed", path, "see who owns it"), _opened(path) as fd:
        _lock(fd, path)
        path.unlink()
        os.close(fd)


def _drop_all() -> None:
    for writer in list(_open_writers):
        writer._drop()


_open_writers: weakref.WeakSet[TrajectoryWriter] = weakref.WeakSet()
# A lock lasts until every copy of the open file is closed: a child must not hold its parent's.
os.register_at_fork(after_in_child=_drop_all)


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    """A file that stays open unless the block raises."""
    fd = os.open(path, _FLAGS | flags, 0o666)
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def _explained(what: str, path: Path, remedy: str) -> Iterator[None]:
    """Say in one sentence what an error of the system's means."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"trajectory: {path} must be {what}, got {error.strerror}; {remedy}"
        ) from error


def _require_new(path: Path) -> None:
    require(
        not path.exists(),
        f"trajectory: {path} must be new, got a file that is there; append to it, or choose "
        "another output.",
    )


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"trajectory: {path} must have one writer, got a second one while the first has it "
            "open; wait until that run has ended, or choose another output."
        ) from error


def _write(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    if written != len(data):
        raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes written")


def _sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
