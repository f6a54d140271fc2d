"""`trajectory.mezo`: a run as its seed and its coefficients, one record of fixed size a step.

The file is only ever appended to. docs/trajectory.md has it byte by byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from mezo._inputs import require

FORMAT_VERSION = 1
MAGIC = b"MEZOTRAJ"
_FIXED = struct.Struct("<8sII")  # magic, version, bytes of the compressed JSON
_CRC = struct.Struct("<I")
_LARGEST_HEADER = 1 << 26
# What a status is in a record; the order is the format's. 128 is added where there was an update.
_STATUSES = ("OK", "NONFINITE_LOSS", "EQUAL_LOSSES", "LOST_PERTURBATION")
_HAS_UPDATE = 128


@dataclass(frozen=True)
class Header:
    """All that a replay and a training that goes on need beside the records.

    Args:
        seed: of the directions and of theta_0.
        distribution: of the directions.
        num_directions: of each step.
        tensors: canonical names and global shapes, by name.
        theta_0: `theta_0_hash` of the initial values.
        model: what identifies the base model, see `mezo.checkpoint.identity`.
        data: what identifies the training examples.
        adapter: what PEFT's files need: base_model, alora_invocation_tokens, partners.
        config: all fields of the run's `MeZOConfig`.
        settings: what run.yaml had when the run began.
        versions: {package: version}.
        created: when, ISO 8601.
        branch: {"of", "at"}: whose first steps these are; None for a run of its own.
    """

    seed: int
    distribution: str
    num_directions: int
    tensors: tuple[tuple[str, tuple[int, int]], ...]
    theta_0: str
    model: dict[str, str]
    data: dict[str, str]
    adapter: dict[str, Any]
    config: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    created: str
    branch: dict[str, Any] | None

    def encoded(self) -> bytes:
        """The beginning of a file."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        packed = zlib.compress(text, 9)
        whole = _FIXED.pack(MAGIC, FORMAT_VERSION, len(packed)) + packed
        return whole + _CRC.pack(zlib.crc32(whole))


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Args:
        step: its number, from 0.
        coefficients: of its directions, as fp32 has them; empty for a skipped step.
        losses: (plus, minus) of each direction, nats, rounded to fp32.
        status: name of its `StepStatus`.
        cursor: training examples used up when it had been taken.
        decay: share of theta taken off before the update; 0 in this version.
    """

    step: int
    coefficients: tuple[float, ...]
    losses: tuple[tuple[float, float], ...]
    status: str
    cursor: int
    decay: float = 0.0


class _Records(Sequence[StepRecord]):
    """The records of a file's bytes, decoded when they are looked at."""

    def __init__(self, data: bytes, count: int, num_directions: int) -> None:
        self._data, self._count, self._form = data, count, Form(num_directions)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...
    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            raise IndexError(f"record {index} of {self._count}")
        size = self._form.size
        return self._form.decoded(self._data[index * size : (index + 1) * size])

    def __iter__(self) -> Iterator[StepRecord]:
        return (self[i] for i in range(self._count))


class Form:
    """How a record lies in its bytes: `<IBQf`, three floats for each direction, a CRC."""

    def __init__(self, num_directions: int) -> None:
        self.num_directions = num_directions
        self.body = struct.Struct(f"<IBQf{3 * num_directions}f")
        self.size = self.body.size + _CRC.size
        self.dtype = np.dtype(
            {
                "names": ["step", "status", "values"],
                "formats": ["<u4", "u1", ("<f4", (num_directions, 3))],
                "offsets": [0, 4, 17],
                "itemsize": self.size,
            }
        )

    def encoded(self, record: StepRecord, salt: int) -> bytes:
        """The bytes of a record; ``salt`` is the header's CRC, so that it fits this file only."""
        status = _STATUSES.index(record.status)
        coefficients: Sequence[float] = record.coefficients
        if coefficients:
            status += _HAS_UPDATE
        else:
            coefficients = [0.0] * self.num_directions
        pairs = zip(record.losses, coefficients, strict=True)
        # Rounded first: struct refuses what overflows, where a loss becomes inf.
        with np.errstate(over="ignore"):
            values = np.array([[*pair, c] for pair, c in pairs], dtype=np.float32).ravel()
        whole = self.body.pack(record.step, status, record.cursor, record.decay, *values.tolist())
        return whole + _CRC.pack(zlib.crc32(whole, salt))

    def is_good(self, data: bytes, number: int, salt: int) -> bool:
        """Whether bytes are the record of a step of this file."""
        whole, crc = data[: self.body.size], data[self.body.size :]
        return (
            len(data) == self.size
            and _CRC.unpack(crc)[0] == zlib.crc32(whole, salt)
            and self.body.unpack(whole)[0] == number
        )

    def decoded(self, data: bytes) -> StepRecord:
        """The record in good bytes."""
        step, status, cursor, decay, *values = self.body.unpack(data[: self.body.size])
        pairs = list(zip(values[::3], values[1::3], strict=True))
        coefficients = tuple(values[2::3]) if status & _HAS_UPDATE else ()
        name = _STATUSES[status & ~_HAS_UPDATE]
        return StepRecord(step, coefficients, tuple(pairs), name, cursor, decay)


@dataclass(frozen=True)
class Trajectory:
    """What is read of a file.

    Args:
        header: its header.
        records: its good records, in order.
        coefficients: `[N, q]` fp32; zeros for a skipped step.
        is_skipped: `[N]` bool: whether a step was skipped.
        cut: a sentence on what the end of the file lacks; None where it is whole.
        num_good_bytes: where the last good record ends.
        salt: the header's CRC, with which those of the records begin.
    """

    header: Header
    records: Sequence[StepRecord]
    coefficients: np.ndarray[Any, np.dtype[np.float32]]
    is_skipped: np.ndarray[Any, np.dtype[np.bool_]]
    cut: str | None
    num_good_bytes: int
    salt: int = dataclasses.field(repr=False)


def theta_0_hash(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of tensors' fp32 values, little-endian, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def read(path: str | Path) -> Trajectory:
    """Read a trajectory; nothing is written or locked, so this works beside a training.

    Raises:
        ValueError: no trajectory, one of a newer format, or a corrupt one: what and where.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    header, begin = _header_of(data, path)
    form, salt = Form(header.num_directions), _CRC.unpack(data[begin - _CRC.size : begin])[0]
    body = data[begin:]
    size = form.size
    count = 0
    while form.is_good(body[count * size : (count + 1) * size], count, salt):
        count += 1
    good = begin + count * size
    for number in range(count + 1, len(body) // size):
        require(
            not form.is_good(body[number * size : (number + 1) * size], number, salt),
            f"trajectory: {path} must have a good record of each step, got a corrupt one of step "
            f"{count}, at byte {good}, and good ones behind it; restore the file from a copy, or "
            f"replay the first {count} steps.",
        )
    rest = len(data) - good
    cut = None
    if rest:
        cut = (
            f"trajectory: {path} ends in {rest} bytes that are no whole record, behind step "
            f"{count}; the step of which they are is not in it."
        )
    records = np.frombuffer(body, dtype=form.dtype, count=count)
    skipped = (records["status"] & _HAS_UPDATE) == 0
    coefficients = np.ascontiguousarray(records["values"][:, :, 2])
    found = _Records(body, count, header.num_directions)
    return Trajectory(header, found, coefficients, skipped, cut, good, salt)


def _header_of(data: bytes, path: str | Path) -> tuple[Header, int]:
    """The header of a file's bytes, and where it ends."""
    require(
        data[: len(MAGIC)] == MAGIC and len(data) >= _FIXED.size,
        f"trajectory: {path} must begin with {MAGIC.decode()}, got {data[:8]!r}; pass a "
        "trajectory.mezo that mezo has written.",
    )
    _, version, length = _FIXED.unpack_from(data)
    require(
        version == FORMAT_VERSION,
        f"trajectory: {path} must be of format {FORMAT_VERSION}, got {version}; use the "
        "mezo-sglang that has written it.",
    )
    end = _FIXED.size + length
    is_whole = length <= _LARGEST_HEADER and len(data) >= end + _CRC.size
    crc = _CRC.unpack_from(data, end)[0] if is_whole else -1
    require(
        crc == zlib.crc32(data[:end]),
        f"trajectory: the header of {path} must have the CRC that stands behind it, got another "
        "one; restore the file from a copy.",
    )
    values = json.loads(zlib.decompress(data[_FIXED.size : end]))
    known = {field.name for field in dataclasses.fields(Header)}
    values = {name: value for name, value in values.items() if name in known}
    values["tensors"] = tuple((name, tuple(shape)) for name, shape in values["tensors"])
    return Header(**values), end + _CRC.size
