"""AdapterPlan: an adapter's tensors, their logical places and slots, checked once, as tables.

The tables hold one row of int64 per tensor or slot; csrc/table.h declares the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mezo_kernels.directions.philox import TensorSpec

# Codes of csrc/table.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Elements of one entry of the work list; a tensor's last entry may have fewer.
WORK_BLOCK = 2048
# Elements that a GPU thread computes at once: 16 bytes of fp16 or bf16.
VECTOR = 8


@dataclass(frozen=True)
class DeviceTables:
    """What a GPU kernel needs of a plan, in the memory of the plan's device.

    Args:
        tensors: `[N, 9]` int64, the TensorRow of csrc/table.h of each master.
        outputs: `[K * N, 3]` int64, the OutputRow of each slot and tensor, slot by slot.
        vectors: `[N, 8]` int32, the VectorRow of csrc/table.h; zeros for tensors on other paths.
        work: `[W, 2]` int32, (tensor, block): block b of a tensor is its positions
            b * WORK_BLOCK ... in the shard at hand, row * cols + col.
        num_vector: the first so many entries are of tensors whose runs of `VECTOR` positions lie in
            one row, begin at an element index that `VECTOR` divides, and are aligned to 16 bytes
            in the master and in every slot.
    """

    tensors: torch.Tensor
    outputs: torch.Tensor
    vectors: torch.Tensor
    work: torch.Tensor
    num_vector: int


class AdapterPlan:
    """The static table of an adapter's tensors, and of the slots they are written to.

        masters[i] <-> specs[i] <-> outputs[k][i] for every slot k

    Build it once; pass it to `add_directions_` and `perturb_into` in place of their tensors. They
    then check nothing and allocate next to nothing. The plan keeps the tensors alive; their storage
    must not be replaced (`tensor.data = ...`, `resize_`) while the plan is in use.

    Args:
        masters: N tensors `[rows_i, cols_i]`, fp32 | fp16 | bf16 (fp32 where there are outputs),
            one device, last dim contiguous; views of a larger tensor are fine.
        specs: N `TensorSpec`, the logical place of each tensor.
        outputs: K slots of N tensors each, the shape of the masters, fp32 | fp16 | bf16, same
            device, last dim contiguous. Outputs must not overlap one another nor the masters.

    Raises:
        ValueError: lengths that do not match; a wrong shape, dtype, stride or device; one address
            given twice; two tensor names with one uid.

    Numerics: none. Graph-safe: building it is not. Cost: about 5 us per tensor.

    Example:
        >>> import mezo_kernels as mk
        >>> theta, spec = torch.zeros(2, 3), mk.TensorSpec("q_proj.lora_A", (2, 3))
        >>> plan = mk.AdapterPlan([theta], [spec])
        >>> for step in range(3):
        ...     mk.add_directions_(plan, directions=[mk.Direction(7, step)], coefficients=[1e-3])
    """

    def __init__(
        self,
        masters: Sequence[torch.Tensor],
        specs: Sequence[TensorSpec],
        outputs: Sequence[Sequence[torch.Tensor]] | None = None,
    ) -> None:
        self.masters = tuple(masters)
        self.specs = tuple(specs)
        self.outputs = None if outputs is None else tuple(tuple(slot) for slot in outputs)
        self.device = self.masters[0].device if self.masters else torch.device("cpu")
        self._device_tables: DeviceTables | None = None
        self._check_lengths()
        self._check_uids()
        for i, (master, spec) in enumerate(zip(self.masters, self.specs, strict=True)):
            self._check_tensor(f"masters[{i}]", master, spec)
            if self.outputs is not None and master.dtype != torch.float32:
                raise ValueError(
                    f"AdapterPlan: masters[{i}] must be torch.float32 where there are outputs, got "
                    f"{master.dtype}; keep an fp32 master and write the slots from it."
                )
        for k, slot in enumerate(self.outputs or ()):
            for i, (output, spec) in enumerate(zip(slot, self.specs, strict=True)):
                self._check_tensor(f"outputs[{k}][{i}]", output, spec)
        self._check_addresses()
        self.tensor_table = _table([tensor_row(*p) for p in zip(masters, specs, strict=True)], 9)
        self.output_table = _table([output_row(t) for slot in self.outputs or () for t in slot], 3)

    def device_tables(self) -> DeviceTables:
        """The tables in the memory of the plan's device, made once."""
        if self._device_tables is None:
            work, num_vector = self._work_list()
            self._device_tables = DeviceTables(
                self.tensor_table.to(self.device),
                self.output_table.to(self.device),
                self._vector_table().to(self.device),
                work.to(self.device),
                num_vector,
            )
        return self._device_tables

    def _work_list(self) -> tuple[torch.Tensor, int]:
        """(tensor, block) pairs, those of vector tensors first, and how many these are."""
        is_vector = [self._is_vector(i) for i in range(len(self.masters))]
        parts = [
            torch.stack((torch.full_like(blocks, i), blocks), dim=1)
            for wanted in (True, False)
            for i, master in enumerate(self.masters)
            if is_vector[i] == wanted
            for blocks in [torch.arange(-(-master.numel() // WORK_BLOCK), dtype=torch.int32)]
        ]
        num_vector = sum(len(part) for part in parts[: sum(is_vector)])
        return torch.cat(parts) if parts else torch.empty(0, 2, dtype=torch.int32), num_vector

    def _vector_table(self) -> torch.Tensor:
        """One row for each tensor, in the words of uint32."""
        rows = [
            _vector_row(spec) if self._is_vector(i) else (0,) * 8
            for i, spec in enumerate(self.specs)
        ]
        words = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 8)
        return (words - (words >> 31 << 32)).to(torch.int32)

    def _is_vector(self, i: int) -> bool:
        """Whether the tensor's runs of `VECTOR` positions can be computed as a whole."""
        spec = self.specs[i]
        counts = [spec.shape[1], spec.col0, spec.row0 * spec.whole_shape[1]]
        counts += [spec.whole_shape[1]] if spec.shape[0] > 1 else []
        for tensor in (self.masters[i], *(slot[i] for slot in self.outputs or ())):
            address, row_stride, _ = output_row(tensor)
            # The kernels count a stride in 32 bits.
            if address % 16 or row_stride >= 1 << 32:
                return False
            counts.append(row_stride)
        return all(count % VECTOR == 0 for count in counts)

    def _check_lengths(self) -> None:
        if len(self.specs) != len(self.masters):
            raise ValueError(
                f"AdapterPlan: specs must have one entry per tensor, {len(self.masters)}, got "
                f"{len(self.specs)}; pass a TensorSpec for each tensor."
            )
        for k, slot in enumerate(self.outputs or ()):
            if len(slot) != len(self.masters):
                raise ValueError(
                    f"AdapterPlan: outputs[{k}] must have one tensor per master, "
                    f"{len(self.masters)}, got {len(slot)}; pass the whole slot."
                )

    def _check_uids(self) -> None:
        names: dict[int, str] = {}
        for spec in self.specs:
            other = names.setdefault(spec.uid, spec.name)
            if other != spec.name:
                raise ValueError(
                    f"AdapterPlan: tensor names must have different uids, got {other!r} and "
                    f"{spec.name!r} with uid {spec.uid:#010x}; rename one of them."
                )

    def _check_tensor(self, what: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"AdapterPlan: {what} must have the shape of {spec.name}, {spec.shape}, got "
                f"{tuple(tensor.shape)}; pass the tensor without its padding."
            )
        if tensor.dtype not in DTYPE_CODES:
            raise ValueError(
                f"AdapterPlan: {what} must be one of {[str(d) for d in DTYPE_CODES]}, got "
                f"{tensor.dtype}; convert it, or keep it out of the adapter."
            )
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"AdapterPlan: {what} must have stride(-1) == 1, got shape {tuple(tensor.shape)} "
                f"stride {tensor.stride()}; pass the row-major view, e.g. pool[slot, :rows, :cols]."
            )
        if tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
            raise ValueError(
                f"AdapterPlan: {what} must have rows that do not overlap, got shape "
                f"{tuple(tensor.shape)} stride {tensor.stride()}; pass an unexpanded tensor."
            )
        if tensor.device != self.device:
            raise ValueError(
                f"AdapterPlan: {what} must be on {self.device} like masters[0], got "
                f"{tensor.device}; make one plan per device."
            )

    def _check_addresses(self) -> None:
        names: dict[int, str] = {}
        entries = [(f"masters[{i}]", t) for i, t in enumerate(self.masters)]
        for k, slot in enumerate(self.outputs or ()):
            entries += [(f"outputs[{k}][{i}]", t) for i, t in enumerate(slot)]
        for what, tensor in entries:
            if tensor.numel() == 0:
                continue
            other = names.setdefault(tensor.data_ptr(), what)
            if other != what:
                raise ValueError(
                    f"AdapterPlan: every tensor must have memory of its own, got the same address "
                    f"for {other} and {what}; give each master and each slot its own storage."
                )


def output_row(tensor: torch.Tensor) -> tuple[int, int, int]:
    """The OutputRow of csrc/table.h."""
    rows, cols = tensor.shape
    # One row is contiguous whatever its stride says.
    row_stride = tensor.stride(0) if rows > 1 else cols
    return tensor.data_ptr(), row_stride, DTYPE_CODES[tensor.dtype]


def tensor_row(tensor: torch.Tensor, spec: TensorSpec) -> tuple[int, ...]:
    """The TensorRow of csrc/table.h: memory, shape and logical place."""
    place = (spec.uid, spec.row0, spec.col0, spec.whole_shape[1])
    return (*output_row(tensor), *spec.shape, *place)


def _vector_row(spec: TensorSpec) -> tuple[int, ...]:
    """The VectorRow of csrc/table.h of a vector tensor.

    umulhi(2 i, multiplier) >> shift is i // cols for every i < 2**31: the multiplier is
    2**(31 + shift) / cols rounded up, by less than 1, and i times that error stays below
    2**(31 + shift) as long as cols <= 2**shift (Granlund and Montgomery 1994).
    """
    rows, cols = spec.shape
    global_cols = spec.whole_shape[1]
    cols, global_cols = cols // VECTOR, global_cols // VECTOR
    first = (spec.row0 * spec.whole_shape[1] + spec.col0) // VECTOR
    if rows * cols == 0:
        return (0,) * 8
    shift = (cols - 1).bit_length()
    multiplier = -(-(1 << (31 + shift)) // cols)
    return spec.uid, rows * cols, cols, global_cols, first, multiplier, shift, 0


def _table(rows: Sequence[tuple[int, ...]], width: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
