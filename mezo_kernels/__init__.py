"""Kernels for training with forward passes: directions, attention, label losses.

Importing this package compiles nothing and touches no GPU.
"""

from mezo_kernels.attention import shared_prefix_attention
from mezo_kernels.attention.plan import SharedPrefixPlan
from mezo_kernels.backends import backends
from mezo_kernels.directions import add_directions_, perturb_into, sample
from mezo_kernels.directions.philox import Direction, TensorSpec, philox4x32
from mezo_kernels.directions.plan import AdapterPlan
from mezo_kernels.nll import label_logits, label_nll

__all__ = [
    "AdapterPlan",
    "Direction",
    "SharedPrefixPlan",
    "TensorSpec",
    "add_directions_",
    "backends",
    "label_logits",
    "label_nll",
    "perturb_into",
    "philox4x32",
    "sample",
    "shared_prefix_attention",
]
