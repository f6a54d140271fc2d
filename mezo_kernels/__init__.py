"""Kernels that regenerate random directions from a Philox counter, for lists of torch tensors.

Importing this package compiles nothing and touches no GPU.
"""

from mezo_kernels.backends import backends
from mezo_kernels.directions import add_directions_, perturb_into, sample
from mezo_kernels.directions.device_step import DeviceStep
from mezo_kernels.philox import Direction, TensorSpec, philox4x32
from mezo_kernels.plan import AdapterPlan

__all__ = [
    "AdapterPlan",
    "DeviceStep",
    "Direction",
    "TensorSpec",
    "add_directions_",
    "backends",
    "perturb_into",
    "philox4x32",
    "sample",
]
