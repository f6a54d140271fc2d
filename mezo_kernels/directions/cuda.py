"""The cuda backend: addresses of a plan's tables and of a call's scalars, handed to the module."""

import os

import torch

from mezo_kernels import _native
from mezo_kernels.directions.cpu import direction_table
from mezo_kernels.directions.philox import MASK32, Direction, TensorSpec
from mezo_kernels.directions.plan import AdapterPlan, tensor_row
from mezo_kernels.directions.scalars import Scalars

ENVIRONMENT_VARIABLE = "MEZO_CUDA_LANES"
# Which elements a thread has in tensors of the vector path (csrc/cuda/walk.cuh); the bits are the
# same. `python -m bench.directions` says on a GPU which is faster. Delete the other one then: this
# switch, `lanes` from here to the kernels, kRun (with its cuda_on_host fixture and budgets).
LANES = ("wide", "contiguous")


def sample(spec: TensorSpec, direction: Direction, device: torch.device) -> torch.Tensor:
    """Return z of a tensor."""
    z = torch.empty(spec.shape, dtype=torch.float32, device=device)
    tensor = torch.tensor([tensor_row(z, spec)], dtype=torch.int64)
    row = direction_table([direction])
    _native.module().cuda_sample(z.data_ptr(), tensor.data_ptr(), row.data_ptr(), *_at(z.device))
    return z


def add_scalars_(plan: AdapterPlan, scalars: Scalars, *, lanes: str | None = None) -> None:
    """Add the update that lies on the device to the masters."""
    _native.module().cuda_add_directions(
        _tables(plan), _scalars(scalars), _seed(scalars), is_contiguous(lanes), *_at(plan.device)
    )


def perturb_scalars(plan: AdapterPlan, scalars: Scalars, *, lanes: str | None = None) -> None:
    """Update the masters and write every slot, with scalars that lie on the device."""
    rows = (_tables(plan), _scalars(scalars), _seed(scalars), scalars.indices)
    _native.module().cuda_perturb(*rows, is_contiguous(lanes), *_at(plan.device))


def is_contiguous(lanes: str | None) -> bool:
    """Whether a thread has neighbours by four: as an argument says, else the environment.

    Raises:
        ValueError: there are no such lanes.
    """
    what = "lanes" if lanes else ENVIRONMENT_VARIABLE
    name = lanes or os.environ.get(ENVIRONMENT_VARIABLE) or LANES[0]
    if name not in LANES:
        raise ValueError(
            f"cuda backend: {what} must be one of {list(LANES)}, got {name!r}; "
            f"leave it out for {LANES[0]!r}."
        )
    return name == "contiguous"


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
