"""Damaged files: what is wrong is named or cut, and never taken for a record."""

from __future__ import annotations

import random

import pytest

from mezo.checkpoint.trajectory import decode, encode_header
from tests.support.trajectories import file_of, header, record, same


def test_truncation_at_every_byte():
    raw, head = file_of(5, 2), encode_header(header(2))
    size = header(2).record_size
    for end in range(len(raw)):
        if end < len(head):
            with pytest.raises(ValueError, match=r"must (begin with MEZOTRAJ|have a whole header)"):
                decode(raw[:end], "file")
            continue
        found = decode(raw[:end], "file")
        count, rest = divmod(end - len(head), size)
        assert (len(found.records), found.num_good_bytes) == (count, end - rest)
        assert all(same(one, record(i, 2)) for i, one in enumerate(found.records))
        if rest == 0:
            assert found.cut is None
        else:
            said = f"{count} records; the {rest} bytes behind them, from byte {end - rest} on, are"
            assert said in found.cut


def test_a_flip_of_every_bit():
    raw, head = file_of(5), encode_header(header())
    size = header().record_size
    for bit in range(8 * len(raw)):
        wrong = bytearray(raw)
        wrong[bit // 8] ^= 1 << bit % 8
        place = (bit // 8 - len(head)) // size
        if place == 4:
            found = decode(bytes(wrong), "file")
            assert (len(found.records), found.num_good_bytes) == (4, len(raw) - size)
            assert "holds 4 records; the 33 bytes behind them" in found.cut
            continue
        at = len(head) + place * size
        said = (
            f"a wrong record {place} at byte {at} with a good one behind it at byte {at + size};"
            if place >= 0
            else "must be of format version"
            if bit // 8 in range(8, 12)
            else "must (have a whole header|begin with MEZOTRAJ)"
        )
        with pytest.raises(ValueError, match=said):
            decode(bytes(wrong), "file")


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"\xff" * 100, b"MEZOTRAJ" * 9, b"\0"])
@pytest.mark.parametrize("count", [0, 3])
def test_a_tail_without_a_good_record_is_cut(tail, count):
    raw = file_of(count)
    found = decode(raw + tail, "file")
    assert (len(found.records), found.num_good_bytes) == (count, len(raw))
    assert f"the {len(tail)} bytes behind them" in found.cut


def test_lost_or_inserted_bytes_are_named():
    raw, head = file_of(9), encode_header(header())
    at = len(head) + 2 * 33
    for wrong in (raw[:at] + raw[at + 7 :], raw[:at] + b"\0" * 7 + raw[at:], raw[:at] + raw[-33:]):
        with pytest.raises(ValueError, match=f"a wrong record 2 at byte {at} with a good one"):
            decode(wrong, "file")


def test_a_record_that_comes_twice_is_cut():
    raw = file_of(4)
    found = decode(raw + raw[-33:], "file")
    assert len(found.records) == 4
    assert "the 33 bytes behind them" in found.cut


def test_records_of_another_run_are_no_good_ones():
    other = file_of(5, seed=1)
    found = decode(file_of(3) + other[-66:], "file")
    assert len(found.records) == 3
    assert "the 66 bytes behind them" in found.cut


def mutated(raw: bytes, choose: random.Random) -> bytes:
    """Some change of bytes that a disk, a copy or a user may make."""
    wrong = bytearray(raw)
    for _ in range(choose.choice((1, 1, 1, 2, 5))):
        at = choose.randrange(len(wrong) + 1)
        size = choose.choice((1, 4, 33, choose.randrange(1, 200)))
        kind = choose.randrange(6)
        if kind == 0:
            wrong[at : at + size] = bytes(len(wrong[at : at + size]))
        elif kind == 1:
            wrong[at : at + size] = choose.randbytes(len(wrong[at : at + size]))
        elif kind == 2:
            del wrong[at : at + size]
        elif kind == 3:
            wrong[at:at] = choose.randbytes(size)
        elif kind == 4:
            wrong[at:at] = wrong[choose.randrange(len(wrong) + 1) :][:size]
        else:
            del wrong[at:]
    return bytes(wrong)


def check_mutations(count: int, seed: int) -> dict[str, int]:
    """Whatever is done to a file, what is read are records that were written, from the first on."""
    choose = random.Random(seed)
    raw, size = file_of(8), header().record_size
    ends = {"refused": 0, "cut": 0, "whole": 0}
    for _ in range(count):
        wrong = mutated(raw, choose)
        try:
            found = decode(wrong, "file")
        except ValueError as error:
            assert str(error).startswith("trajectory: file must ")  # noqa: PT017
            ends["refused"] += 1
            continue
        assert wrong[: found.num_good_bytes] == raw[: found.num_good_bytes]
        assert found.num_good_bytes == len(raw) - size * (8 - len(found.records))
        # Nothing that was written later is left behind what is cut.
        later = [raw[len(raw) - size * (8 - i) :][:size] for i in range(len(found.records), 8)]
        assert not any(one in wrong[found.num_good_bytes :] for one in later)
        ends["cut" if found.cut else "whole"] += 1
    return ends


def test_random_mutations():
    assert all(check_mutations(2000, seed=1).values())


@pytest.mark.proof
def test_100000_random_mutations():
    assert all(check_mutations(100_000, seed=2).values())
