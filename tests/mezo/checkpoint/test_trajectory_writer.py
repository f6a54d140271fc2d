"""Making, continuing and locking a trajectory file; what fails is in test_trajectory_faults."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from mezo.checkpoint import trajectory_writer
from mezo.checkpoint.trajectory import read
from mezo.checkpoint.trajectory_writer import TrajectoryWriter
from tests.support.source import ROOT
from tests.support.trajectories import check, forked, header, record, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trajectory.mezo"


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
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"x"
    with pytest.raises(ValueError, match="must have one writer"):
        TrajectoryWriter.append_to(path)
    writer.append(record(0))
    writer.close()
    with TrajectoryWriter.append_to(path) as second:  # the child is still there
        second.append(record(1))
    os.write(goes_on[1], b"x")
    assert os.waitpid(process, 0)[1] == 0
    for end in (ready[0], *goes_on):
        os.close(end)
    check(path, 2)


def test_a_forgotten_writer_lets_the_file_go(path):
    writer = TrajectoryWriter.create(path, header())
    writer.append(record(0))
    del writer
    with TrajectoryWriter.append_to(path) as second:
        assert second.num_records == 1
