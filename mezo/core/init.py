"""theta_0: the values that an adapter starts from."""

from __future__ import annotations

import math

import torch

from mezo_kernels import TensorSpec, philox4x32

# Domains 0 to 2 of the Philox counter belong to directions; initial values are 3.
_INIT_DOMAIN = 3


def initial_values(spec: TensorSpec, seed: int) -> torch.Tensor:
    """Return theta_0 of one adapter tensor, or of a shard of one.

    lora_A is Kaiming-uniform as in PEFT, U(-1/sqrt(d_in), 1/sqrt(d_in)), with its random words from
    our own Philox counter (domain 3, step 0), so that a run is a function of its seed; lora_B is 0.

    Args:
        spec: the tensor; its name ends in `lora_A` ([r, d_in]) or `lora_B` ([d_out, r]).
        seed: the run's seed.

    Returns:
        fp32 tensor of ``spec.shape`` on the CPU, equal for a shard and for the slice of the whole.

    Numerics: 24-bit uniforms without 0 and the bounds, scaled in float64, rounded to fp32 once.
    Source: PEFT `LoraLayer.reset_lora_parameters`; He et al. 2015 (a = sqrt(5)).
    """
    rows, cols = spec.shape
    if spec.name.endswith("lora_B"):
        return torch.zeros(rows, cols, dtype=torch.float32)
    global_cols = (spec.global_shape or spec.shape)[1]
    row = torch.arange(spec.row0, spec.row0 + rows, dtype=torch.int64)[:, None]
    col = torch.arange(spec.col0, spec.col0 + cols, dtype=torch.int64)[None, :]
    element = (row * global_cols + col).reshape(-1)
    first, last = int(element[0]) >> 2, int(element[-1]) >> 2
    counter = torch.zeros(last - first + 1, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(first, last + 1)
    counter[:, 1] = spec.uid
    counter[:, 3] = _INIT_DOMAIN << 24
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32], dtype=torch.int64)
    words = philox4x32(counter, key).reshape(-1)[element - 4 * first]
    uniform = ((words >> 8).double() + 0.5) * 2.0**-23 - 1.0  # (-1, 1), exact
    return (uniform / math.sqrt(global_cols)).float().reshape(rows, cols)
