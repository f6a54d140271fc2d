"""The cpu backend: tables and addresses handed to mezo_kernels._C."""

from collections.abc import Sequence

import torch

from mezo_kernels import _native
from mezo_kernels.directions.philox import MASK32, Direction, TensorSpec
from mezo_kernels.directions.plan import AdapterPlan, tensor_row

Update = tuple[Sequence[Direction], Sequence[float]]


def direction_table(directions: Sequence[Direction]) -> torch.Tensor:
    """Rows (key low, key high, step, domain << 24 | index), as csrc/table.h declares them."""
    rows = [(d.seed & MASK32, d.seed >> 32, d.step, d.tail) for d in directions]
    return torch.tensor(rows, dtype=torch.int64)


def slot_tables(
    directions: Sequence[Direction], scales: Sequence[float]
) -> tuple[list[Direction], torch.Tensor, torch.Tensor]:
    """The distinct directions, and per slot the index of its direction (-1 for none) and scale."""
    positions: dict[Direction, int] = {}
    indices = [
        positions.setdefault(direction, len(positions)) if scale != 0 else -1
        for direction, scale in zip(directions, scales, strict=True)
    ]
    return (
        list(positions),
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor(scales, dtype=torch.float32),
    )


def sample(spec: TensorSpec, direction: Direction, device: torch.device) -> torch.Tensor:
    """Return z of a tensor."""
    z = torch.empty(spec.shape, dtype=torch.float32, device=device)
    tensor = torch.tensor([tensor_row(z, spec)], dtype=torch.int64)
    directions = direction_table([direction])
    _native.module().cpu_sample(
        z.data_ptr(), tensor.data_ptr(), directions.data_ptr(), torch.get_num_threads()
    )
    return z


def add_directions_(
    plan: AdapterPlan, directions: Sequence[Direction], coefficients: Sequence[float]
) -> None:
    """Add a combination of directions to the masters."""
    table = direction_table(directions)
    factors = torch.tensor(coefficients, dtype=torch.float32)
    _native.module().cpu_add_directions(
        plan.tensor_table.data_ptr(),
        len(plan.masters),
        table.data_ptr(),
        factors.data_ptr(),
        len(directions),
        torch.get_num_threads(),
    )


def perturb_into(
    plan: AdapterPlan, directions: Sequence[Direction], scales: Sequence[float], update: Update
) -> None:
    """Update the masters, then write every slot from them."""
    distinct, indices, factors = slot_tables(directions, scales)
    table, update_table = direction_table(distinct), direction_table(update[0])
    update_factors = torch.tensor(update[1], dtype=torch.float32)
    _native.module().cpu_perturb(
        plan.tensor_table.data_ptr(),
        len(plan.masters),
        update_table.data_ptr(),
        update_factors.data_ptr(),
        len(update[0]),
        table.data_ptr(),
        len(distinct),
        indices.data_ptr(),
        factors.data_ptr(),
        plan.output_table.data_ptr(),
        len(directions),
        torch.get_num_threads(),
    )
