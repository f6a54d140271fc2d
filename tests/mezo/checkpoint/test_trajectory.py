"""The file of a run's steps: what is written is read, and what is wrong is never read as right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo import StepStatus
from mezo.checkpoint.trajectory import (
    STATUSES,
    StepRecord,
    decode,
    encode_header,
    encode_record,
    header_crc,
    read,
    theta_0_hash,
)
from mezo.checkpoint.trajectory_writer import TrajectoryWriter
from tests.support.source import ROOT
from tests.support.trajectories import file_of, header, record, same, write

PAGE = ROOT / "docs" / "trajectory.md"


@pytest.mark.parametrize("num_directions", [1, 3])
def test_what_is_written_is_read(tmp_path, num_directions):
    path = write(tmp_path / "trajectory.mezo", 23, num_directions)
    found = read(path)
    assert path.read_bytes() == file_of(23, num_directions)
    assert found.header == header(num_directions)
    assert (found.cut, found.num_good_bytes) == (None, path.stat().st_size)
    written = [record(i, num_directions) for i in range(23)]
    assert all(map(same, found.records, written))
    assert same(found.records[-1], written[-1])
    assert all(map(same, found.records[5:7], written[5:7]))
    assert found.steps.tolist() == list(range(23))
    assert found.is_skipped.tolist() == [i % 5 == 4 for i in range(23)]
    assert found.coefficients.dtype == np.float32
    expected = [one.coefficients or (0.0,) * num_directions for one in written]
    assert found.coefficients.tolist() == [list(row) for row in expected]


def test_a_header_without_records_is_a_trajectory(tmp_path):
    found = read(write(tmp_path / "trajectory.mezo", 0))
    assert len(found.records) == 0
    assert found.coefficients.shape == (0, 1)
    assert found.cut is None


def test_20000_steps_need_less_than_700_kb():
    tensors = tuple(sorted((f"model.layers.{i}.lora_A", (8, 576)) for i in range(420)))
    head = header(tensors=tensors)
    assert head.record_size == 33
    assert len(encode_header(head)) + 20_000 * head.record_size < 700_000


def test_statuses_are_those_of_a_step():
    assert [status.name for status in StepStatus] == list(STATUSES)


def test_coefficients_of_zero_are_no_skipped_step():
    crc = header_crc(encode_header(header()))
    zero = StepRecord(0, (-0.0,), ((1.0, 1.0),), "EQUAL_LOSSES", 1)
    skipped = dataclasses.replace(zero, coefficients=())
    rows = [encode_record(one, 1, crc) for one in (zero, skipped)]
    found = [decode(encode_header(header()) + row, "x") for row in rows]
    assert [one.is_skipped.tolist() for one in found] == [[False], [True]]
    assert math.copysign(1.0, found[0].records[0].coefficients[0]) == -1.0


# Random headers and records.

FLOAT32 = st.floats(width=32)
FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text(max_size=8)
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    ),
    max_size=4,
)  # fmt: skip
SIDE = st.integers(1, 2**16)
HEADERS = st.builds(
    header,
    num_directions=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
        st.tuples(SIDE, SIDE),
        min_size=1,
        max_size=4,
    ).map(lambda tensors: tuple(sorted(tensors.items()))),
    theta_0=st.binary(min_size=32, max_size=32).map(bytes.hex),
    config=JSON,
    settings=JSON,
    created=st.text(max_size=8),
    branch=st.none() | JSON,
)


@st.composite
def records_of(draw, num_directions):
    rows = []
    for step in range(draw(st.integers(0, 6))):
        every = {"min_size": num_directions, "max_size": num_directions}
        coefficients = st.just([]) | st.lists(FINITE32, **every)
        losses = st.lists(st.tuples(FLOAT32, FLOAT32), **every)
        status, cursor = draw(st.sampled_from(STATUSES)), draw(st.integers(0, 2**64 - 1))
        values = (tuple(draw(coefficients)), tuple(draw(losses)), status, cursor, draw(FINITE32))
        rows.append(StepRecord(step, *values))
    return rows


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(HEADERS, st.data())
def test_any_header_and_records_come_back(head, data):
    rows = data.draw(records_of(head.num_directions))
    front = encode_header(head)
    encoded = [encode_record(row, head.num_directions, header_crc(front)) for row in rows]
    found = decode(front + b"".join(encoded), "file")
    assert found.header == head
    assert len(found.records) == len(rows)
    assert all(map(same, found.records, rows))
    assert found.cut is None
    # One that is cut anywhere is read up to the last whole record.
    size = data.draw(st.integers(len(front), len(front) + head.record_size * len(rows)))
    found = decode((front + b"".join(encoded))[:size], "file")
    count, rest = divmod(size - len(front), head.record_size)
    assert (len(found.records), found.cut is None) == (count, rest == 0)
    assert all(map(same, found.records, rows))


# What is refused.


def test_files_of_other_kinds(tmp_path):
    raw = file_of(2)
    path = tmp_path / "trajectory.mezo"
    newer = raw[:8] + struct.pack("<I", 2) + raw[12:]
    cases = {
        b"": "must begin with MEZOTRAJ, got b''; pass a trajectory.mezo",
        b"PK\3\4" * 20: "must begin with MEZOTRAJ, got b'PK",
        newer: "must be of format version 1, got 2; use the version of mezo that wrote it",
        newer[:20]: "must be of format version 1, got 2",
    }
    for content, said in cases.items():
        path.write_bytes(content)
        for opens in (read, TrajectoryWriter.append_to):
            with pytest.raises(ValueError, match=re.escape(f"{path} {said}")):
                opens(path)
            assert path.read_bytes() == content
    for wrong, said in ((tmp_path, "got a directory"), (tmp_path / "gone", "got none")):
        with pytest.raises(ValueError, match=f"must be a file, {said}"):
            read(wrong)


def with_json(change) -> bytes:
    """A header with a good CRC and other JSON."""
    raw = encode_header(header())
    fields = json.loads(zlib.decompress(raw[16:-4]))
    change(fields)
    packed = zlib.compress(json.dumps(fields).encode())
    head = struct.pack("<8sII", b"MEZOTRAJ", 1, len(packed)) + packed
    return head + struct.pack("<I", zlib.crc32(head))


def test_fields_that_are_not_ours_are_named():
    cases = {
        "got Header.__init__.. got an unexpected keyword argument 'more'": {"more": 1},
        "got Direction: seed must be an int": {"seed": -1},
        "got too many values to unpack": {"tensors": [["a", [1, 2, 3]]]},
    }
    for said, fields in cases.items():
        with pytest.raises(ValueError, match=f"must have the header's fields, {said}"):
            decode(with_json(lambda found, fields=fields: found.update(fields)), "file")
    crc = header_crc(encode_header(header()))
    raw = bytearray(encode_record(record(0), 1, crc)[:-4])
    raw[4] = 0x80 | 9
    raw += struct.pack("<I", zlib.crc32(raw, crc))
    with pytest.raises(ValueError, match="must have statuses below 4, got 9; use the version"):
        decode(encode_header(header()) + raw, "file")


def test_headers_that_cannot_be():
    pair = (("b", (1, 1)), ("a", (1, 1)))
    with pytest.raises(ValueError, match="tensors must be sorted by name, each name once, got"):
        header(tensors=pair)
    with pytest.raises(ValueError, match="tensors must be sorted by name"):
        header(tensors=(pair[0], pair[0]))
    with pytest.raises(ValueError, match="tensors must be sorted by name"):
        header(tensors=())
    with pytest.raises(ValueError, match="theta_0 must be a sha256 of 64 hex digits, got 'AB'"):
        header(theta_0="AB")
    with pytest.raises(ValueError, match="Direction: index must be"):
        header(num_directions=0)
    for value in (math.nan, {1}):
        with pytest.raises(ValueError, match=r"header must hold what JSON can hold, got .*; pass"):
            encode_header(header(config={"lr": value}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"coefficients": (1.0, 2.0)}, "must have 1 coefficients, or none, and 1 pairs .* got 2"),
        ({"losses": ()}, "must have 1 coefficients, or none, and 1 pairs of losses, got 1 and 0"),
        ({"coefficients": (math.nan,)}, r"finite coefficients and a finite decay, got \(nan,\)"),
        ({"coefficients": (1e39,)}, "must have finite coefficients"),
        ({"decay": math.inf}, "a finite decay, got .* and inf; pass"),
        ({"status": "FINE"}, "must have a status of .*, got 'FINE', 0 and 1"),
        ({"step": 2**32}, r"a step in \[0, 2\*\*32\) .* got 'OK', 4294967296"),
        ({"cursor": -1}, r"a cursor in \[0, 2\*\*64\), got 'OK', 0 and -1; pass"),
    ],
)
def test_records_that_cannot_be(changes, said):
    good = StepRecord(0, (1.0,), ((1.0, 2.0),), "OK", 1)
    with pytest.raises(ValueError, match=f"trajectory: record {changes.get('step', 0)} .*{said}"):
        encode_record(dataclasses.replace(good, **changes), 1, 0)


def test_floats_are_rounded_to_fp32_once():
    head = encode_header(header())
    row = StepRecord(0, (0.1,), ((1e39, -1e39),), "OK", 1, decay=0.3)
    (found,) = decode(head + encode_record(row, 1, header_crc(head)), "file").records
    rounded = [torch.tensor(value).item() for value in (0.1, 0.3)]
    assert [*found.coefficients, found.decay] == rounded
    assert found.losses == ((math.inf, -math.inf),)


def test_the_hash_of_theta_0():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    raw = struct.pack("<8f", 0, 1, 2, 3, 4, 5, 1, 1)
    assert theta_0_hash({"b": b, "a": a}) == hashlib.sha256(raw).hexdigest()
    assert theta_0_hash({"a": a.T.contiguous().T, "b": b}) == hashlib.sha256(raw).hexdigest()
    with pytest.raises(ValueError, match=r"must be float32, got torch.bfloat16 for a; pass"):
        theta_0_hash({"a": a.bfloat16()})


def test_the_reader_of_the_docs(tmp_path):
    """It needs Python only, and says what ours says."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 40
    assert set(re.findall(r"^import (.+)$", code, re.M)) == {"json, struct, sys, zlib"}
    (tmp_path / "reader.py").write_text(code)
    path = write(tmp_path / "trajectory.mezo", 7, 2)
    path.write_bytes(path.read_bytes() + b"torn")
    command = [sys.executable, "-I", "reader.py", path.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert json.loads(first) == json.loads(json.dumps(dataclasses.asdict(header(2))))
    rows = [json.loads(line) for line in lines[:-1]]
    for found, ours in zip(rows, read(path).records, strict=True):
        assert repr(found) == repr(
            [
                ours.step,
                STATUSES.index(ours.status),
                ours.cursor,
                ours.decay,
                [list(pair) for pair in ours.losses],
                list(ours.coefficients),
            ]
        )
    assert lines[-1] == "7 records; 4 bytes behind them"


def test_the_page_names_every_status():
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert rows == [(str(i), name) for i, name in enumerate(STATUSES)]
