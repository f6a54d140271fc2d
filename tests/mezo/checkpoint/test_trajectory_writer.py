"""Appending: what a call that returned has written is kept, whatever fails or is killed after it."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import random
import resource
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings

import pytest

from mezo.checkpoint import trajectory_writer
from mezo.checkpoint.trajectory import read
from mezo.checkpoint.trajectory_writer import TrajectoryWriter
from tests.support.source import ROOT
from tests.support.trajectories import FaultySystem, header, record, same, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trajectory.mezo"


def check(path, count: int) -> None:
    """The file has ``count`` records, the right ones."""
    found = read(path)
    assert len(found.records) == count
    assert all(same(one, record(i)) for i, one in enumerate(found.records))


# Creating and appending.


def test_records_can_be_read_while_they_are_written(path):
    with TrajectoryWriter.create(path, header()) as writer:
        for step in range(5):
            check(path, step)
            assert writer.num_records == step
            writer.append(record(step))
        check(path, 5)
    assert len(writer.trajectory.records) == 0
    writer.close()
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_appending_goes_on_where_it_ended(path, caplog):
    whole = write(path.with_name("whole"), 9).read_bytes()
    write(path, 4)
    with TrajectoryWriter.append_to(path) as writer:
        assert writer.trajectory.header == header()
        assert (writer.num_records, writer.trajectory.cut) == (4, None)
        for step in range(4, 9):
            writer.append(record(step))
    assert path.read_bytes() == whole
    assert not caplog.records


@pytest.mark.parametrize("tail", [b"torn", b"\0" * 4096])
def test_a_torn_end_is_cut_and_said(path, caplog, tail):
    whole = write(path, 4).read_bytes()
    path.write_bytes(whole + tail)
    assert read(path).cut is not None
    assert path.read_bytes() == whole + tail
    with caplog.at_level(logging.WARNING), TrajectoryWriter.append_to(path) as writer:
        assert path.read_bytes() == whole
        writer.append(record(4))
    check(path, 5)
    (said,) = caplog.messages
    assert said == (
        f"trajectory: {path} holds 4 records; the {len(tail)} bytes behind them, from byte "
        f"{len(whole)} on, are no whole record and are cut"
    )


def test_corruption_is_named_and_left(path):
    raw = bytearray(write(path, 5).read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    said = f"wrong record 1 at byte {len(raw) - 4 * 33} with a good one behind it at byte"
    for _ in range(2):  # the lock is free again
        with pytest.raises(ValueError, match=said):
            TrajectoryWriter.append_to(path)
        assert path.read_bytes() == raw


def test_a_file_that_is_there_is_not_made_again(path):
    content = write(path, 3).read_bytes()
    with pytest.raises(ValueError, match="must be new, got a file that is there; append to it"):
        TrajectoryWriter.create(path, header())
    assert path.read_bytes() == content
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_what_a_killed_creation_left_is_used(path):
    path.with_name("trajectory.mezo.tmp").write_bytes(b"MEZOTRAJ" * 500)
    check(write(path, 2), 2)
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_steps_come_once_and_in_order(path):
    with TrajectoryWriter.create(path, header()) as writer:
        writer.append(record(0))
        for step in (0, 2):
            with pytest.raises(ValueError, match=f"must be of step 1, got {step}; append every"):
                writer.append(record(step))
        with pytest.raises(ValueError, match="record 1 must have 1 coefficients"):
            writer.append(record(1, num_directions=2))
        writer.append(record(1))
    check(path, 2)


def test_a_closed_writer_says_so(path):
    writer = TrajectoryWriter.create(path, header())
    writer.close()
    for call in (lambda: writer.append(record(0)), writer.sync):
        with pytest.raises(RuntimeError, match=r"must be open, got a closed one; open the file"):
            call()


# One writer.


def test_a_second_writer_is_refused(path):
    said = "must have one writer, got a second one while the first has it open; wait until"
    with TrajectoryWriter.create(path, header()) as writer:
        writer.append(record(0))
        content = path.read_bytes() + b"torn"
        path.write_bytes(content)  # a second writer must not cut it
        with pytest.raises(ValueError, match=said):
            TrajectoryWriter.append_to(path)
        code = (
            "import sys\n"
            "from mezo.checkpoint.trajectory_writer import TrajectoryWriter\n"
            "try:\n    TrajectoryWriter.append_to(sys.argv[1])\n"
            "except ValueError as error:\n    print(error)\n"
        )
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert said in done.stdout
        assert path.read_bytes() == content
        os.truncate(path, len(content) - 4)
        writer.append(record(1))
    check(path, 2)


def test_two_creations_at_once(path):
    other = os.open(path.with_name("trajectory.mezo.tmp"), os.O_RDWR | os.O_CREAT)
    trajectory_writer._lock(other, path)
    with pytest.raises(ValueError, match="must have one writer"):
        TrajectoryWriter.create(path, header())
    os.close(other)
    check(write(path, 1), 1)


def forked(body) -> int:
    """Run a function in a forked child; returns its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: other threads
        child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def test_a_forked_child_neither_keeps_nor_ends_the_lock(path):
    writer = TrajectoryWriter.create(path, header())
    ready, goes_on = os.pipe(), os.pipe()

    def child() -> None:
        with pytest.raises(RuntimeError, match="got a closed one"):
            writer.append(record(0))
        writer.close()
        os.write(ready[1], b"x")
        os.read(goes_on[0], 1)

    process = forked(child)
    assert os.read(ready[0], 1) == b"x"
    with pytest.raises(ValueError, match="must have one writer"):
        TrajectoryWriter.append_to(path)
    writer.append(record(0))
    writer.close()
    with TrajectoryWriter.append_to(path) as second:  # the child is still there
        second.append(record(1))
    os.write(goes_on[1], b"x")
    assert os.waitpid(process, 0)[1] == 0
    for end in (*ready, *goes_on):
        os.close(end)
    check(path, 2)


def test_a_forgotten_writer_lets_the_file_go(path):
    writer = TrajectoryWriter.create(path, header())
    writer.append(record(0))
    del writer
    with TrajectoryWriter.append_to(path) as second:
        assert second.num_records == 1


# What is durable when.


@pytest.fixture
def system(monkeypatch):
    """A function that puts a system in the place of the writer's."""

    def place(*arguments, **named) -> FaultySystem:
        faulty = FaultySystem(*arguments, **named)
        monkeypatch.setattr(trajectory_writer, "os", faulty)
        return faulty

    return place


def test_a_new_file_is_durable_before_it_has_its_name(path, system):
    calls = system().calls
    TrajectoryWriter.create(path, header()).close()
    assert calls == ["open", "ftruncate", "write", "fsync", "rename", "open", "fsync"]


def test_records_become_durable_in_groups(path, system, monkeypatch):
    now = 100.0
    monkeypatch.setattr(trajectory_writer.time, "monotonic", lambda: now)
    writer = TrajectoryWriter.create(path, header(), every=3, seconds=5.0)
    calls = system().calls
    for step in range(7):
        writer.append(record(step))
    assert calls == 2 * (3 * ["write"] + ["fsync"]) + ["write"]
    calls.clear()
    writer.sync()
    writer.sync()
    assert calls == ["fsync"]
    now = 104.9
    writer.append(record(7))
    now = 105.0
    writer.append(record(8))
    assert calls == ["fsync", "write", "write", "fsync"]
    calls.clear()
    writer.append(record(9))
    writer.close()
    assert calls == ["write", "fsync"]


def test_a_power_loss_keeps_what_was_durable(path, monkeypatch):
    """What comes after the last fsync is lost, partly written, or zero."""
    choose, synced, real = random.Random(3), [0], os.fsync
    front = len(write(path.with_name("empty"), 0).read_bytes())

    def noted(fd):
        real(fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(trajectory_writer.os, "fsync", noted)
    for trial in range(60):
        lost = path.with_name(f"{trial}.mezo")
        writer = TrajectoryWriter.create(lost, header(), every=choose.randrange(1, 9), seconds=60.0)
        for step in range(choose.randrange(30)):
            writer.append(record(step))
        kept, size = synced[-1], lost.stat().st_size
        writer._drop()
        end = choose.randint(kept, size)
        raw = lost.read_bytes()[:end] + bytes(choose.choice((0, size - end, 4096)))
        lost.write_bytes(raw)
        with TrajectoryWriter.append_to(lost) as again:
            assert again.num_records == (end - front) // 33
            again.append(record(again.num_records))
        check(lost, again.num_records)


# Calls that fail.


def run_to_the_end(path, done: list[int]) -> None:
    """Make a file of 8 records, in two goes, and note how many are there after each call."""
    if not path.exists():
        with TrajectoryWriter.create(path, header(), every=2, seconds=60.0) as writer:
            for step in range(5):
                writer.append(record(step))
                done.append(step + 1)
        with path.open("ab") as file:
            file.write(b"torn")
    with TrajectoryWriter.append_to(path, every=2, seconds=60.0) as writer:
        for step in range(writer.num_records, 8):
            writer.append(record(step))
            done.append(step + 1)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("is_lasting", [False, True])
@pytest.mark.parametrize("name", FaultySystem.FUNCTIONS)
def test_every_call_that_can_fail_fails_once(tmp_path, system, name, is_lasting, error):
    whole = write(tmp_path / "whole", 8).read_bytes()
    for number in range(1, 100):
        path, done = tmp_path / f"{number}.mezo", [0]
        faulty = system(name, number, error, is_lasting=is_lasting)
        if has_ended := not faulty_run(path, done):
            assert not faulty.has_failed
            break
        system()
        if path.exists():
            check(path, read(path).num_good_bytes // 33 - len(whole) // 33 + 8)
            assert len(read(path).records) >= done[-1]
        assert not path.with_name(f"{number}.mezo.tmp").exists()
        run_to_the_end(path, done)
        assert path.read_bytes() == whole
    assert has_ended
    assert number > {"open": 3, "write": 9, "fsync": 8, "rename": 1, "ftruncate": 2}[name]


def faulty_run(path, done: list[int]) -> bool:
    """Whether a run fails, as it should: with one sentence."""
    try:
        run_to_the_end(path, done)
    except OSError as error:
        said = str(error)
        assert said.count("\n") == 0  # noqa: PT017
        assert f"trajectory: {path} must be " in said  # noqa: PT017
        return True
    return False


def test_a_full_disk_loses_one_record_only(path, system):
    writer = TrajectoryWriter.create(path, header())
    writer.append(record(0))
    system("write", 1, errno.ENOSPC)
    said = "must be written, got No space left on device; make room there and append the record"
    with pytest.raises(OSError, match=said) as caught:
        writer.append(record(1))
    assert caught.value.errno == errno.ENOSPC
    check(path, 1)
    for step in (1, 2):
        writer.append(record(step))
    writer.close()
    check(path, 3)


def test_a_short_write_is_taken_back(path):
    """A real one: the system lets the file grow by half a record only."""
    writer = TrajectoryWriter.create(path, header())
    writer.append(record(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 16, limits[1]))
    try:
        with pytest.raises(OSError, match="must be written, got 16 of 33 bytes written; make"):
            writer.append(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size
    writer.append(record(1))
    writer.close()
    check(path, 2)


def test_an_interrupt_leaves_the_record_or_not_but_no_half(path, monkeypatch):
    writer = TrajectoryWriter.create(path, header())
    writer.append(record(0))

    def interrupted(fd, data):
        os.write(fd, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trajectory_writer, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.append(record(1))
    assert writer.num_records == 1
    check(path, 1)
    writer.append(record(1))
    writer.close()
    check(path, 2)


def test_a_writer_that_cannot_take_back_writes_nothing_more(path, system, monkeypatch):
    writer = TrajectoryWriter.create(path, header())
    writer.append(record(0))
    system("ftruncate", 1, errno.EIO)

    def half(fd, data):
        os.write(fd, data[:9])
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(trajectory_writer, "_write", half)
    with pytest.raises(OSError, match="must be written, got Input/output error"):
        writer.append(record(1))
    monkeypatch.undo()
    for call in (lambda: writer.append(record(1)), writer.sync):
        with pytest.raises(
            OSError, match="got part of a record that could not be taken away; look"
        ):
            call()
    writer.close()
    with TrajectoryWriter.append_to(path) as again:
        again.append(record(1))
    check(path, 2)


def test_after_an_fsync_that_failed_nothing_is_written(path, system):
    writer = TrajectoryWriter.create(path, header(), every=2)
    calls = system("fsync", 1, errno.EIO).calls
    writer.append(record(0))
    with pytest.raises(OSError, match="must be made durable, got Input/output error; look after"):
        writer.append(record(1))
    for call in (lambda: writer.append(record(2)), writer.sync):
        with pytest.raises(OSError, match="got records that could not be made durable; look after"):
            call()
    writer.close()  # does not try again: it would succeed
    assert calls == ["write", "write", "fsync"]
    run_to_the_end(path, [])
    check(path, 8)


# Kills.


def kill_at_random(body, seconds: float) -> bytes:
    """Kill a child that runs ``body(said)``; returns what it had put into ``said`` by then."""
    said = mmap.mmap(-1, 16)
    child = forked(lambda: body(said))
    deadline = time.monotonic() + 60.0
    while said[:8] == bytes(8) and time.monotonic() < deadline:
        time.sleep(0.0005)
    threading.Event().wait(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return said[:]


def check_kills(path, count: int, seed: int) -> int:
    """Kill a writer ``count`` times; returns how many records there are in the end."""
    choose = random.Random(seed)
    TrajectoryWriter.create(path, header()).close()

    def appends(said) -> None:
        with TrajectoryWriter.append_to(path, every=choose.randrange(1, 65)) as writer:
            while True:
                writer.append(record(writer.num_records))
                said[:8] = struct.pack("<Q", writer.num_records)

    for _ in range(count):
        (said,) = struct.unpack_from("<Q", kill_at_random(appends, choose.random() * 0.05))
        found = read(path)
        assert len(found.records) in (said, said + 1)
    check(path, len(found.records))
    return len(found.records)


def check_kills_of_creation(directory, count: int, seed: int) -> int:
    """Kill what makes files, ``count`` times; returns how many there are in the end."""
    choose = random.Random(seed)

    def creates(said) -> None:
        i = len(list(directory.glob("*.mezo")))
        while True:
            TrajectoryWriter.create(directory / f"{i}.mezo", header()).close()
            i += 1
            said[:8] = struct.pack("<Q", i)

    for _ in range(count):
        (said,) = struct.unpack_from("<Q", kill_at_random(creates, choose.random() * 0.02))
        files = list(directory.glob("*.mezo"))
        assert len(files) in (said, said + 1)
        for file in files[-3:]:
            check(file, 0)
    return len(files)


def test_20_kills(path):
    assert check_kills(path, 20, seed=1) > 100


def test_10_kills_of_a_creation(tmp_path):
    assert check_kills_of_creation(tmp_path, 10, seed=2) > 10


@pytest.mark.proof
def test_1000_kills(path, tmp_path):
    assert check_kills(path, 1000, seed=3) > 5000
    (tmp_path / "new").mkdir()
    assert check_kills_of_creation(tmp_path / "new", 200, seed=4) > 200
