"""Trajectory files for tests, and a system whose calls fail when they are told to."""

from __future__ import annotations

import dataclasses
import math
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mezo.checkpoint.trajectory import (
    Header,
    StepRecord,
    encode_header,
    encode_record,
    header_crc,
    read,
)
from mezo.checkpoint.trajectory_writer import TrajectoryWriter

STATUSES = ("OK", "EQUAL_LOSSES", "LOST_PERTURBATION")


def header(num_directions: int = 1, **changes: Any) -> Header:
    fields: dict[str, Any] = {
        "seed": 2**64 - 3,
        "distribution": "gaussian",
        "num_directions": num_directions,
        "tensors": (("layers.0.q_proj.lora_A", (8, 16)), ("layers.0.q_proj.lora_B", (16, 8))),
        "theta_0": "0123456789abcdef" * 4,
        "model": {"config_sha256": "ab" * 32},
        "data": {"rows_sha256": "cd" * 32},
        "adapter": {"base_model": "models/tiny"},
        "config": {"lr": 1e-3, "eps": 1e-3, "names": ["a", "b"], "none": None},
        "settings": {"steps": 100},
        "versions": {"mezo": "0.1.0"},
        "created": "2026-11-28T12:00:00+00:00",
    }
    return Header(**(fields | changes))


def record(step: int, num_directions: int = 1) -> StepRecord:
    """A record of a step: always the same; every fifth step is skipped, its losses not finite."""
    generator = np.random.default_rng(step)
    losses = generator.normal(1.0, 0.1, (num_directions, 2)).astype(np.float32)
    coefficients = generator.normal(0.0, 1e-3, num_directions).astype(np.float32)
    is_skipped = step % 5 == 4
    if is_skipped:
        losses[0] = (math.nan, math.inf)
    return StepRecord(
        step=step,
        coefficients=() if is_skipped else tuple(coefficients.tolist()),
        losses=tuple((plus, minus) for plus, minus in losses.tolist()),
        status="NONFINITE_LOSS" if is_skipped else STATUSES[step % 3],
        cursor=16 * (step + 1) + 2**40,
        decay=float(np.float32(1e-5 * step)),
    )


def write(path: Path, count: int, num_directions: int = 1, **changes: Any) -> Path:
    """A file of ``count`` records."""
    with TrajectoryWriter.create(path, header(num_directions, **changes)) as writer:
        for step in range(count):
            writer.append(record(step, num_directions))
    return path


def file_of(count: int, num_directions: int = 1, **changes: Any) -> bytes:
    """The bytes of a file, without a disk."""
    head = encode_header(header(num_directions, **changes))
    crc = header_crc(head)
    records = [encode_record(record(i, num_directions), num_directions, crc) for i in range(count)]
    return b"".join([head, *records])


def same(first: StepRecord, second: StepRecord) -> bool:
    """Whether two records are equal, where NaN is NaN."""
    return repr(dataclasses.astuple(first)) == repr(dataclasses.astuple(second))


def check(path: Path, count: int) -> None:
    """See that a file has ``count`` records, the right ones."""
    found = read(path)
    assert len(found.records) == count
    assert all(same(one, record(i)) for i, one in enumerate(found.records))


def forked(body: Callable[[], None]) -> int:
    """Run a function in a forked child, which exits with 0 unless it raises; returns its id."""
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


class FaultySystem:
    """Stands for the module `os`: one call of one function fails, or all from that one on.

    Args:
        name: the function.
        number: which of its calls fails, from 1.
        error: errno that it fails with.
        is_lasting: whether every call from that one on fails.

    Attributes:
        calls: names of the calls so far.
        has_failed: whether the call has come.
    """

    FUNCTIONS = ("open", "write", "fsync", "rename", "ftruncate", "posix_fadvise")

    def __init__(
        self, name: str = "", number: int = 0, error: int = 0, *, is_lasting: bool = False
    ) -> None:
        self._name, self._number, self._error = name, number, error
        self._is_lasting = is_lasting
        self.calls: list[str] = []
        self.has_failed = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.FUNCTIONS:
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            number = self.calls.count(name)
            is_due = number >= self._number if self._is_lasting else number == self._number
            if name == self._name and is_due:
                self.has_failed = True
                raise OSError(self._error, os.strerror(self._error))
            return real(*arguments, **named)

        return call
