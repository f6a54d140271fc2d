"""The cuda backend: addresses of a plan's tables and of a call's scalars, handed to the module."""

import torch

from mezo_kernels import _native
from mezo_kernels.directions.cpu import direction_table
from mezo_kernels.directions.philox import MASK32, Direction, TensorSpec
from mezo_kernels.directions.plan import AdapterPlan, tensor_row
from mezo_kernels.directions.scalars import Scalars


def sample(spec: TensorSpec, direction: Direction, device: torch.device) -> torch.Tensor:
    """Return z of a tensor."""
    z = torch.empty(spec.shape, dtype=torch.float32, device=device)
    tensor = torch.tensor([tensor_row(z, spec)], dtype=torch.int64)
    row = direction_table([direction])
    _native.module().cuda_sample(z.data_ptr(), tensor.data_ptr(), row.data_ptr(), *_at(z.device))
    return z


def add_scalars_(plan: AdapterPlan, scalars: Scalars) -> None:
    """Add the update that lies on the device to the masters."""
    _native.module().cuda_add_directions(
        _tables(plan), _scalars(scalars), _seed(scalars), *_at(plan.device)
    )


def perturb_scalars(plan: AdapterPlan, scalars: Scalars) -> None:
    """Update the masters and write every slot, with scalars that lie on the device."""
    _native.module().cuda_perturb(
        _tables(plan), _scalars(scalars), _seed(scalars), scalars.indices, *_at(plan.device)
    )


def _tables(plan: AdapterPlan) -> tuple[int, ...]:
    tables = plan.device_tables()
    addressed = (tables.tensors, tables.vectors, tables.outputs, tables.work)
    addresses = (table.data_ptr() for table in addressed)
    return (*addresses, len(plan.masters), len(tables.work), tables.num_vector)


def _scalars(scalars: Scalars) -> tuple[int, ...]:
    buffers = (scalars.directions, scalars.factors, scalars.num_updates)
    return (*(buffer.data_ptr() for buffer in buffers), scalars.max_updates)


def _seed(scalars: Scalars) -> tuple[int, int, int]:
    """What all directions have in common; domain -1 stands for nothing."""
    if scalars.domain is None or scalars.key is None:
        return -1, 0, 0
    return scalars.domain, scalars.key & MASK32, scalars.key >> 32


def _at(device: torch.device) -> tuple[int, int]:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, stream
