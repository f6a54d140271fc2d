"""The cuda backend: tables copied to the device and addresses handed to mezo_kernels._C."""

from collections.abc import Sequence

import torch

from mezo_kernels import _native
from mezo_kernels.directions.native import Update, direction_table, slot_tables
from mezo_kernels.philox import Direction, TensorSpec
from mezo_kernels.plan import AdapterPlan, tensor_row


def sample(spec: TensorSpec, direction: Direction, device: torch.device) -> torch.Tensor:
    """Return z of a tensor."""
    z = torch.empty(spec.shape, dtype=torch.float32, device=device)
    tensor = torch.tensor([tensor_row(z, spec)], dtype=torch.int64)
    directions = direction_table([direction]).to(z.device)
    _native.module().cuda_sample(
        z.data_ptr(), tensor.data_ptr(), directions.data_ptr(), *_target(z.device)
    )
    return z


def add_directions_(
    plan: AdapterPlan, directions: Sequence[Direction], coefficients: Sequence[float]
) -> None:
    """Add a combination of directions to the masters."""
    table = direction_table(directions).to(plan.device)
    factors = torch.tensor(coefficients, dtype=torch.float32, device=plan.device)
    _native.module().cuda_add_directions(
        plan.tensor_table.data_ptr(),
        len(plan.masters),
        table.data_ptr(),
        factors.data_ptr(),
        len(directions),
        *_target(plan.device),
    )


def perturb_into(
    plan: AdapterPlan, directions: Sequence[Direction], scales: Sequence[float], update: Update
) -> None:
    """Update the masters, then write every slot from them."""
    distinct, indices, factors = slot_tables(directions, scales)
    # The caching allocator reuses these only behind the kernels, on the same stream.
    tables = [
        table.to(plan.device)
        for table in (
            direction_table(update[0]),
            torch.tensor(update[1], dtype=torch.float32),
            direction_table(distinct),
            indices,
            factors,
        )
    ]
    update_table, update_factors, table, indices, factors = tables
    _native.module().cuda_perturb(
        plan.tensor_table.data_ptr(),
        len(plan.masters),
        update_table.data_ptr(),
        update_factors.data_ptr(),
        len(update[0]),
        table.data_ptr(),
        len(distinct),
        indices.data_ptr(),
        factors.data_ptr(),
        plan.device_tables().outputs.data_ptr(),
        len(directions),
        *_target(plan.device),
    )


def _target(device: torch.device) -> tuple[int, int]:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return int(device.index), stream
