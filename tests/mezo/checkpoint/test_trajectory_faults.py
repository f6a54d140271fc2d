"""What a call that returned has written is kept, whatever fails or is killed after it."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import signal
import stat
import struct
import time

import pytest

from mezo.checkpoint import trajectory_writer
from mezo.checkpoint.trajectory import read
from mezo.checkpoint.trajectory_writer import TrajectoryWriter
from tests.support.trajectories import FaultySystem, check, forked, header, record, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trajectory.mezo"


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


def test_a_new_file_whose_name_is_not_durable_is_no_file(path, system):
    system("fsync", 2, errno.EIO)
    with pytest.raises(OSError, match="must be created, got Input/output error; make room"):
        TrajectoryWriter.create(path, header())
    assert not list(path.parent.iterdir())
    check(write(path, 2), 2)


def test_what_the_disk_has_is_read(path, system):
    write(path, 2)
    calls = system().calls
    TrajectoryWriter.append_to(path).close()
    assert calls == ["open", "fsync", "posix_fadvise"]


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
    assert calls == ["write"]
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
            assert name != "write" or read(path).cut is None
        assert not path.with_name(f"{number}.mezo.tmp").exists()
        run_to_the_end(path, done)
        assert path.read_bytes() == whole
    assert has_ended
    assert number > {"open": 3, "write": 9, "fsync": 8, "rename": 1}.get(name, 0)


def faulty_run(path, done: list[int]) -> bool:
    """Whether a run fails, as it should: with one sentence."""
    try:
        run_to_the_end(path, done)
    except OSError as error:
        said = str(error)
        assert said.count("\n") == 0
        assert f"trajectory: {path} must be " in said
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
        with pytest.raises(OSError, match="got part of a record that could not be taken away;"):
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
    time.sleep(seconds)
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
def test_1000_kills(tmp_path):
    # Small files, since each is read after every kill.
    assert all(check_kills(tmp_path / f"{i}.mezo", 20, seed=100 + i) > 100 for i in range(50))
    (tmp_path / "new").mkdir()
    assert check_kills_of_creation(tmp_path / "new", 200, seed=4) > 200
