"""Replay beside the definition: theta step by step, by the reference's z.

Run as a program with TRITON_INTERPRET=1, because triton decides at its import: prints one line of
JSON, {distribution: null or the traceback}, of replay on the triton backend.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from mezo.checkpoint.replay import replay
from mezo.core.init import initial_values
from mezo_kernels import Direction, TensorSpec, sample
from mezo_kernels.directions.fp32 import fma
from tests.support.interpreted import report

SEED = 2**63 + 5
SPECS = [
    TensorSpec("layers.0.q_proj.lora_A", (4, 37)),
    TensorSpec("layers.0.q_proj.lora_B", (129, 4)),
    TensorSpec("layers.1.q_proj.lora_A", (8, 576)),
]
DISTRIBUTIONS = ("gaussian", "rademacher")


def history(steps: int, num_directions: int) -> np.ndarray:
    """Coefficients of steps, of the size of the values of lora_A."""
    rng = np.random.default_rng(steps)
    return rng.normal(0, 0.1, (steps, num_directions)).astype(np.float32)


def step_by_step(specs, distribution, coefficients, is_skipped=None, start=None):
    """Theta after each step from the definition: the reference's z, one fma, step after step."""
    theta = [initial_values(spec, SEED) for spec in specs] if start is None else start
    found = [theta]
    for step, row in enumerate(coefficients.tolist()):
        if is_skipped is None or not is_skipped[step]:
            for index, c in enumerate(row):
                direction = Direction(SEED, step, index, distribution)
                z = [sample(spec, direction, backend="reference") for spec in specs]
                theta = [fma(c, a, b) for a, b in zip(z, theta, strict=True)]
        found.append(theta)
    return found


def has_bits_of(found, expected) -> bool:
    return all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(found, expected, strict=True)
    )


def replayed(specs=SPECS, *, distribution="gaussian", coefficients, **others):
    return replay(
        specs,
        seed=SEED,
        distribution=distribution,
        num_directions=coefficients.shape[1],
        coefficients=coefficients,
        **others,
    )


def check_interpreted(distribution: str) -> None:
    """The triton backend gives the bits of the loop."""
    coefficients = history(4, 2)
    found = replayed(coefficients=coefficients, distribution=distribution, backend="triton")
    assert has_bits_of(found, step_by_step(SPECS, distribution, coefficients)[-1])


if __name__ == "__main__":
    report({name: functools.partial(check_interpreted, name) for name in DISTRIBUTIONS})
