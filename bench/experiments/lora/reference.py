"""The PyTorch reference: slots written by `perturb_into`, then the two products of each copy."""

from itertools import pairwise

import torch

from bench.experiments.lora.call import LoraCall
from mezo_kernels.directions import perturb_into


def perturbed_lora(call: LoraCall) -> None:
    """Write the result of a call."""
    through_slots(call, "reference")


def through_slots(call: LoraCall, backend: str) -> None:
    """Write the factors of every copy with a backend of `perturb_into`, then multiply."""
    dtype = call.x.dtype
    slots = [[torch.empty_like(f, dtype=dtype) for f in (call.a, call.b)] for _ in call.directions]
    perturb_into(
        [call.a, call.b],
        [call.a_spec, call.b_spec],
        slots,
        call.directions,
        call.scales,
        backend=backend,
    )
    for (a, b), (first, last) in zip(slots, pairwise(call.row_indptr), strict=True):
        rows = slice(first, last)
        h = (call.x[rows].float() @ a.float().T).to(dtype)
        y = (h.float() @ b.float().T) * call.scaling
        call.y[rows] = y + call.y[rows].float() if call.is_added else y
