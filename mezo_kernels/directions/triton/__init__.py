"""The triton backend: which kernel a plan and a call need, and its launch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from mezo_kernels._per_plan import per_plan
from mezo_kernels.directions.philox import Direction, TensorSpec
from mezo_kernels.directions.plan import DTYPE_CODES, VECTOR, WORK_BLOCK, AdapterPlan
from mezo_kernels.directions.scalars import Scalars, scalars_of
from mezo_kernels.directions.triton.kernel import FLAT, GENERAL, MIXED, STRIDED, perturb_kernel

# Directions whose z one launch makes for the slots; each is a copy of the code.
_DIRECTIONS_PER_LAUNCH = 8

# (slot, dtype code, direction or -1, whether it is the direction's first), for the kernel.
Write = tuple[int, int, int, bool]


@dataclass(frozen=True)
class _Layout:
    """What of a plan decides which kernel is compiled, and the table that goes with it."""

    constants: dict[str, Any]
    slots: tuple[int, ...]
    paths: torch.Tensor


def sample(spec: TensorSpec, direction: Direction, device: torch.device) -> torch.Tensor:
    """Return z of a tensor."""
    # fma(1, z, -0) is z, whatever the sign of a zero.
    z = torch.full(spec.shape, -0.0, dtype=torch.float32, device=device)
    add_scalars_(AdapterPlan([z], [spec]), scalars_of(z.device, update=([direction], [1.0])))
    return z


def add_scalars_(plan: AdapterPlan, scalars: Scalars) -> None:
    """`add_directions_` of scalars that are on the device; graph-safe after a first call."""
    if scalars.max_updates > 0:
        _launch(plan, scalars, (), has_update=True)


def perturb_scalars(plan: AdapterPlan, scalars: Scalars) -> None:
    """`perturb_into` of scalars that are on the device; graph-safe after a first call."""
    launches = _split(scalars.indices, _layout_of(plan).slots)
    for number, writes in enumerate(launches):
        has_update = number == 0 and scalars.max_updates > 0
        if writes or has_update:
            _launch(plan, scalars, writes, has_update)


def _split(indices: tuple[int, ...], dtypes: tuple[int, ...]) -> list[tuple[Write, ...]]:
    """The writes of each launch, in the order of directions; at least one, if empty, launch."""
    order = sorted(range(len(indices)), key=lambda slot: indices[slot])
    launches: list[list[Write]] = [[]]
    last = -1
    for slot in order:
        direction = indices[slot]
        is_first = direction != last
        if is_first and direction > 0 and direction % _DIRECTIONS_PER_LAUNCH == 0:
            launches.append([])
        launches[-1].append((slot, dtypes[slot], direction, is_first))
        last = direction
    return [tuple(writes) for writes in launches]


def options_of(paths: tuple[int, ...], num_writes: int) -> dict[str, Any]:
    """How the kernel is compiled: 16 elements per thread, and registers that it does not spill."""
    # 80 registers keep six blocks on a multiprocessor, 96 five, 112 four, 160 three.
    if GENERAL.value in paths:
        registers = 112 if num_writes <= 2 else 160
    else:
        registers = 80 if num_writes <= 2 and len(paths) == 1 else 96
    return {"num_warps": 4, "num_stages": 1, "maxnreg": registers, "enable_fp_fusion": False}


def _launch(
    plan: AdapterPlan, scalars: Scalars, writes: tuple[Write, ...], has_update: bool
) -> None:
    tables, layout = plan.device_tables(), _layout_of(plan)
    if len(tables.work) == 0:
        return
    with torch.cuda.device(plan.device) if plan.device.type == "cuda" else contextlib.nullcontext():
        perturb_kernel[(len(tables.work),)](
            tables.tensors,
            tables.outputs,
            tables.work,
            layout.paths,
            scalars.directions,
            scalars.factors,
            scalars.num_updates,
            len(plan.masters),
            scalars.max_updates,
            WRITES=writes,
            DOMAIN=MIXED.value if scalars.domain is None else scalars.domain,
            HAS_UPDATE=has_update,
            **layout.constants,
            **options_of(layout.constants["PATHS"], len(writes)),
        )


@per_plan
def _layout_of(plan: AdapterPlan) -> _Layout:
    paths = _paths(plan)
    masters = plan.tensor_table[:, 2].tolist()
    slots = plan.output_table[:, 2].reshape(len(plan.outputs or ()), len(masters)).tolist()
    is_wide = {*masters, *(code for slot in slots for code in slot)} <= {DTYPE_CODES[torch.float32]}
    constants = {
        "PATHS": tuple(sorted({path for path in paths if path is not None})),
        "MASTER": _common(masters),
        "WORK_BLOCK": WORK_BLOCK,
        # 16 bytes of the narrowest dtype.
        "VECTOR": VECTOR // 2 if is_wide else VECTOR,
    }
    table = torch.tensor([path or 0 for path in paths], dtype=torch.int32).to(plan.device)
    return _Layout(constants, tuple(_common(slot) for slot in slots), table)


def _common(codes: list[int]) -> int:
    return codes[0] if len(set(codes)) == 1 else int(MIXED.value)


def _paths(plan: AdapterPlan) -> list[int | None]:
    """The path of each tensor, None for an empty one."""
    tables = plan.device_tables()
    is_vector = set(tables.work[: tables.num_vector, 0].tolist())
    paths: list[int | None] = []
    for i, spec in enumerate(plan.specs):
        cols = spec.shape[1]
        if plan.masters[i].numel() == 0:
            paths.append(None)
            continue
        rows_of_tables = (plan.tensor_table[i], *plan.output_table[i :: len(plan.specs)])
        strides = {int(row[1]) for row in rows_of_tables}
        # The strided path counts strides in 32 bits.
        if i not in is_vector or max(strides) >= 1 << 32:
            path = GENERAL
        else:
            path = FLAT if strides | {spec.whole_shape[1]} == {cols} else STRIDED
        paths.append(int(path.value))
    return paths
