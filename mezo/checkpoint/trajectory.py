"""Reads trajectory.mezo, the checkpoint of a run: a header, and one record per step.

A run is a function of its seed and of the coefficients of its steps, so that these are all that a
checkpoint needs. docs/trajectory.md has the file byte by byte; `mezo.checkpoint.trajectory_writer`
writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from mezo._inputs import one_line, require, shown
from mezo_kernels import Direction, TensorSpec

FORMAT_VERSION = 1
MAGIC = b"MEZOTRAJ"
# The number of a status in the file is its place here: names are added at the end only.
STATUSES = ("OK", "NONFINITE_LOSS", "EQUAL_LOSSES", "LOST_PERTURBATION")
_UPDATED = 0x80  # bit of the status byte
_PREFIX = struct.Struct("<8sII")  # magic, version, bytes of the compressed JSON
_RECORD = struct.Struct("<IBQf")  # step, status, cursor, decay
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """What a run was started with: all that a replay and a resume need beside the records.

    Args:
        seed: the run's seed, 0 .. 2**64 - 1.
        distribution: of the directions, see `mezo_kernels.Direction`.
        num_directions: directions per step.
        tensors: (canonical name, shape of the whole tensor) of each adapter tensor, by name.
        theta_0: `theta_0_hash` of the initial values.
        model: hashes of the base model's files, as far as they are there.
        data: hashes of the training examples, where they are known.
        adapter: what PEFT's files need: base_model, alora_invocation_tokens, partners.
        config: the configuration that a resumed run must have, as JSON holds it.
        settings: the other settings of the training, as JSON holds them.
        versions: {package: version} of what wrote the file.
        created: date and time, ISO 8601.
        branch: which run and step this one was branched from; None: a run of its own.

    Raises:
        ValueError: a value out of range, tensors that are not sorted by name, or no hash.
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
    versions: dict[str, Any]
    created: str
    branch: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        Direction(self.seed, 0, self.num_directions - 1, self.distribution)  # checks the three
        names = [spec.name for spec in self.specs]
        require(
            bool(names) and names == sorted(set(names)),
            "trajectory: tensors must be sorted by name, each name once, got "
            f"{shown(names)}; pass tuple(sorted(tensors)).",
        )
        require(
            re.fullmatch("[0-9a-f]{64}", self.theta_0) is not None,
            f"trajectory: theta_0 must be a sha256 of 64 hex digits, got {shown(self.theta_0)}; "
            "use theta_0_hash(tensors).",
        )

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The adapter's whole tensors, in the order of ``tensors``."""
        return tuple(TensorSpec(name, shape) for name, shape in self.tensors)

    @property
    def record_size(self) -> int:
        """Bytes of each record."""
        return _RECORD.size + 12 * self.num_directions + _CRC.size


@dataclass(frozen=True)
class StepRecord:
    """One step, as the file keeps it.

    Args:
        step: its number, from 0.
        coefficients: of each direction, theta <- fma(c, z, theta), finite, fp32; () for a step
            that was skipped, which is not the same as coefficients of 0: those may turn -0 to 0.
        losses: (plus, minus) of each direction, nats, fp32; any of them may be NaN or infinite.
        status: a name of `STATUSES`, which are those of `mezo.StepStatus`.
        cursor: training examples used up when the step has been taken.
        decay: weight decay of the step, finite, fp32.
    """

    step: int
    coefficients: tuple[float, ...]
    losses: tuple[tuple[float, float], ...]
    status: str
    cursor: int
    decay: float = 0.0


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What was read of a file.

    Args:
        header: what the run was started with.
        records: the good ones, N of them; number i is step i. They are decoded when asked for.
        cut: one sentence on what stands behind the last good record; None: nothing.
        num_good_bytes: bytes of the file up to the end of the last good record.
    """

    header: Header
    records: Records
    cut: str | None
    num_good_bytes: int

    @property
    def steps(self) -> np.ndarray:
        """Numbers of the steps, `[N]` int64: 0 .. N - 1."""
        return np.asarray(self.records.array["step"], np.int64)

    @property
    def coefficients(self) -> np.ndarray:
        """Coefficients `[N, num_directions]` float32; 0 where ``is_skipped``."""
        found = self.records.array["directions"]["coefficient"]
        return np.ascontiguousarray(found, dtype=np.float32)

    @property
    def is_skipped(self) -> np.ndarray:
        """Which steps left the weights as they were, `[N]` bool."""
        return np.asarray(self.records.array["status"] & _UPDATED == 0)


class Records(Sequence[StepRecord]):
    """Records over the bytes of a file.

    Args:
        array: `[N]`, of `record_dtype`.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> StepRecord | Records:
        if isinstance(index, slice):
            return Records(self.array[index])
        step, status, cursor, decay, *_ = self.array[index].item()
        directions = self.array["directions"][index].tolist()
        return StepRecord(
            step=step,
            coefficients=tuple(c for *_, c in directions) if status & _UPDATED else (),
            losses=tuple((plus, minus) for plus, minus, _ in directions),
            status=STATUSES[status & (_UPDATED - 1)],
            cursor=cursor,
            decay=decay,
        )


def theta_0_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of initial values: their fp32 bytes, little-endian, sorted by name.

    Args:
        tensors: {canonical name: whole fp32 tensor, on any device}.

    Raises:
        ValueError: a tensor of another dtype.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        require(
            tensor.dtype == torch.float32,
            f"trajectory: initial values must be float32, got {tensor.dtype} for {name}; pass the "
            "master's.",
        )
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def read(path: str | Path) -> Trajectory:
    """Read a file. It is not written and not locked: a writer may be at work on it.

    Raises:
        ValueError: no trajectory, one of another format version, a header that is not whole, or a
            wrong record with a good one behind it.
        OSError: the file cannot be read.
    """
    path = Path(path)
    require(
        path.is_file(),
        f"trajectory: {path} must be a file, got {'a directory' if path.is_dir() else 'none'}; "
        "pass a trajectory.mezo from a training's output directory.",
    )
    return decode(path.read_bytes(), path)


def decode(raw: bytes, path: Path) -> Trajectory:
    """Return what a file's bytes hold; ``path`` is for error sentences. Raises as `read` does."""
    header, start, crc = _decode_header(raw, path)
    size = header.record_size
    count = 0
    while _is_good(raw, start + count * size, size, crc, count):
        count += 1
    end = start + count * size
    good = _good_behind(raw, end, size, crc, count)
    require(
        good is None,
        f"trajectory: {path} must have wrong bytes at its end only, got a wrong record {count} at "
        f"byte {end} with a good one behind it at byte {good}; restore the file from a copy, or "
        f"cut it to {end} bytes to go on from step {count}.",
    )
    records = Records(np.frombuffer(raw, record_dtype(header.num_directions), count, start))
    status = int((records.array["status"] & (_UPDATED - 1)).max(initial=0))
    require(
        status < len(STATUSES),
        f"trajectory: {path} must have statuses below {len(STATUSES)}, got {status}; use the "
        "version of mezo that wrote it.",
    )
    cut = None
    if end < len(raw):
        cut = (
            f"trajectory: {path} holds {count} records; the {len(raw) - end} bytes behind them, "
            f"from byte {end} on, are no whole record"
        )
    return Trajectory(header, records, cut, end)


def record_dtype(num_directions: int) -> np.dtype[np.void]:
    """NumPy's dtype of a record, without padding."""
    direction = np.dtype([("plus", "<f4"), ("minus", "<f4"), ("coefficient", "<f4")])
    return np.dtype(
        [
            ("step", "<u4"),
            ("status", "u1"),
            ("cursor", "<u8"),
            ("decay", "<f4"),
            ("directions", direction, (num_directions,)),
            ("crc", "<u4"),
        ]
    )


def encode_header(header: Header) -> bytes:
    """Return a header's bytes, its CRC at the end.

    Raises:
        ValueError: a value that JSON cannot hold, numbers that are not finite among them.
    """
    try:
        text = json.dumps(dataclasses.asdict(header), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"trajectory: the header must hold what JSON can hold, got {one_line(error)}; pass "
            "dicts of texts, numbers, lists and None."
        ) from error
    packed = zlib.compress(text.encode(), 9)
    head = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(packed)) + packed
    return head + _CRC.pack(zlib.crc32(head))


def encode_record(record: StepRecord, num_directions: int, crc: int) -> bytes:
    """Return a record's bytes.

    Args:
        record: floats are rounded to fp32.
        num_directions: of the file.
        crc: of the file's header.

    Raises:
        ValueError: coefficients or losses of another number of directions, coefficients or decay
            that are not finite in fp32, an unknown status, step or cursor out of range.
    """
    what = f"trajectory: record {record.step}"
    given = (len(record.coefficients), len(record.losses))
    require(
        given[0] in (0, num_directions) and given[1] == num_directions,
        f"{what} must have {num_directions} coefficients, or none, and {num_directions} pairs of "
        f"losses, got {given[0]} and {given[1]}; pass one of each direction.",
    )
    require(
        record.status in STATUSES and 0 <= record.step < 2**32 and 0 <= record.cursor < 2**64,
        f"{what} must have a status of {STATUSES}, a step in [0, 2**32) and a cursor in "
        f"[0, 2**64), got {shown(record.status)}, {record.step} and {record.cursor}; pass a "
        "StepStatus's name and counts from 0.",
    )
    values = np.zeros((num_directions, 3), "<f4")
    with np.errstate(over="ignore"):  # a loss beyond fp32 is infinite
        values[:, :2] = record.losses
        values[:, 2] = record.coefficients or 0.0
        decay = float(np.float32(record.decay))
    require(
        bool(np.isfinite(values[:, 2]).all()) and np.isfinite(decay).item(),
        f"{what} must have finite coefficients and a finite decay, got "
        f"{shown(record.coefficients)} and {record.decay}; pass () for a step that is skipped.",
    )
    status = STATUSES.index(record.status) | (_UPDATED if record.coefficients else 0)
    body = _RECORD.pack(record.step, status, record.cursor, decay) + values.tobytes()
    return body + _CRC.pack(zlib.crc32(body, crc))


def header_crc(raw: bytes) -> int:
    """Return the CRC at the end of a header's bytes, with which that of each record begins."""
    return int(_CRC.unpack(raw[-_CRC.size :])[0])


def _decode_header(raw: bytes, path: Path) -> tuple[Header, int, int]:
    """Header, its size in the file, its CRC."""
    require(
        len(raw) >= _PREFIX.size and raw.startswith(MAGIC),
        f"trajectory: {path} must begin with {MAGIC.decode()}, got {shown(raw[:8])}; pass a "
        "trajectory.mezo from a training's output directory.",
    )
    _, version, size = _PREFIX.unpack_from(raw)
    require(
        version == FORMAT_VERSION,
        f"trajectory: {path} must be of format version {FORMAT_VERSION}, got {version}; use the "
        "version of mezo that wrote it.",
    )
    end = _PREFIX.size + size + _CRC.size
    head = raw[: end - _CRC.size]
    require(
        len(raw) >= end and header_crc(raw[:end]) == zlib.crc32(head),
        f"trajectory: {path} must have a whole header, got one of {end} bytes in a file of "
        f"{len(raw)} that does not pass its CRC; restore the file from a copy.",
    )
    try:
        fields = json.loads(zlib.decompress(head[_PREFIX.size :]))
        tensors = tuple((name, (rows, cols)) for name, (rows, cols) in fields.pop("tensors"))
        header = Header(tensors=tensors, **fields)
    except (TypeError, KeyError, ValueError, zlib.error) as error:
        raise ValueError(
            f"trajectory: {path} must have the header's fields, got {one_line(error)}; use the "
            "version of mezo that wrote it."
        ) from error
    return header, end, header_crc(raw[:end])


def _passes(raw: bytes, at: int, size: int, crc: int) -> bool:
    """Whether the bytes at an offset are a whole record of this run."""
    end = at + size - _CRC.size
    return zlib.crc32(raw[at:end], crc).to_bytes(4, "little") == raw[end : end + _CRC.size]


def _is_good(raw: bytes, at: int, size: int, crc: int, step: int) -> bool:
    """Whether the bytes at an offset are the record of a step."""
    return raw[at : at + 4] == step.to_bytes(4, "little") and _passes(raw, at, size, crc)


def _good_behind(raw: bytes, end: int, size: int, crc: int, step: int) -> int | None:
    """Offset of a record of this step or a later one behind the good ones; None: there is none.

    Every byte is tried: where bytes were lost, the records behind them are not where they belong.
    """
    for at in range(end, len(raw) - size + 1):
        if int.from_bytes(raw[at : at + 4], "little") >= step and _passes(raw, at, size, crc):
            return at
    return None
