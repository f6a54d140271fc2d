"""The PyTorch reference of the three calls; it reads like the formulas in their docstrings."""

from collections.abc import Iterator, Sequence

import torch

from mezo_kernels.directions.fp32 import fma
from mezo_kernels.directions.philox import Direction, TensorSpec, direction_of_elements
from mezo_kernels.directions.plan import AdapterPlan

# Rows are computed in blocks of about this many elements to bound the memory of the int64 words.
_BLOCK = 1 << 16


def sample(spec: TensorSpec, direction: Direction, device: torch.device) -> torch.Tensor:
    """Return z of a tensor."""
    z = torch.empty(spec.shape, dtype=torch.float32, device=device)
    for rows in _row_blocks(spec):
        z[rows] = _direction_of_rows(spec, rows, direction, device)
    return z


def add_directions_(
    plan: AdapterPlan, directions: Sequence[Direction], coefficients: Sequence[float]
) -> None:
    """Add a combination of directions to the masters."""
    for tensor, spec in zip(plan.masters, plan.specs, strict=True):
        for rows in _row_blocks(spec):
            total = tensor.detach()[rows].to(torch.float32)
            for direction, coefficient in zip(directions, coefficients, strict=True):
                z = _direction_of_rows(spec, rows, direction, plan.device)
                total = fma(coefficient, z, total)
            tensor.detach()[rows] = total.to(tensor.dtype)


def perturb_into(
    plan: AdapterPlan,
    directions: Sequence[Direction],
    scales: Sequence[float],
    update: tuple[Sequence[Direction], Sequence[float]],
) -> None:
    """Update the masters, then write every slot from them."""
    add_directions_(plan, *update)
    assert plan.outputs is not None
    for i, (master, spec) in enumerate(zip(plan.masters, plan.specs, strict=True)):
        for rows in _row_blocks(spec):
            center = master.detach()[rows]
            drawn: dict[Direction, torch.Tensor] = {}
            for slot, direction, scale in zip(plan.outputs, directions, scales, strict=True):
                value = center
                if scale != 0:
                    if direction not in drawn:
                        drawn[direction] = _direction_of_rows(spec, rows, direction, plan.device)
                    value = fma(scale, drawn[direction], center)
                slot[i].detach()[rows] = value.to(slot[i].dtype)


def _row_blocks(spec: TensorSpec) -> Iterator[slice]:
    rows, cols = spec.shape
    step = max(1, _BLOCK // max(1, cols))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _direction_of_rows(
    spec: TensorSpec, rows: slice, direction: Direction, device: torch.device
) -> torch.Tensor:
    """Z of the shard's rows ``rows``, `[rows, cols]` fp32."""
    cols, global_cols = spec.shape[1], spec.whole_shape[1]
    row_starts = torch.arange(spec.row0 + rows.start, spec.row0 + rows.stop, device=device)
    elements = (row_starts * global_cols + spec.col0)[:, None] + torch.arange(cols, device=device)
    if cols == global_cols:
        # Full rows follow one another: one run instead of a cut group per row.
        z = direction_of_elements(elements.reshape(1, -1), spec.uid, direction)
        return z.reshape(elements.shape)
    return direction_of_elements(elements, spec.uid, direction)
