"""theta at any step from the seed and the coefficients, bit for bit, all steps in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mezo._inputs import require
from mezo.core.init import initial_values
from mezo_kernels import AdapterPlan, Direction, TensorSpec, add_directions_

# Directions of one pass: many, so that theta's blocks stay in the cache, and few enough to show
# how far a replay is.
_PER_PASS = 1024


def replay(
    specs: Sequence[TensorSpec],
    *,
    seed: int,
    distribution: str,
    num_directions: int,
    coefficients: np.ndarray,
    is_skipped: np.ndarray,
    at: int | None = None,
    start: Sequence[torch.Tensor] | None = None,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """Return the adapter tensors behind some steps: what training had then, bit for bit.

    Args:
        specs: N tensors, whole ones or a rank's shards.
        seed: of the run.
        distribution: of its directions.
        num_directions: q, of each step.
        coefficients: `[T, q]` fp32; row i is of step i.
        is_skipped: `[T]` bool: steps without an update.
        at: how many steps; None: all T.
        start: theta_0, N fp32 tensors, which are not changed; None: from the seed.
        backend: of the kernels; None: the best one for the device.
        device: where to.
        progress: told (steps done, of how many) now and then.

    Returns:
        N fp32 tensors.

    Raises:
        ValueError: coefficients of another shape or that are not finite, or ``at`` beyond them.
        RuntimeError: the backend is not usable here.
    """
    total = len(coefficients) if at is None else at
    require(
        coefficients.shape == (len(is_skipped), num_directions) and 0 <= total <= len(coefficients),
        f"replay: coefficients must be [at or more, {num_directions}], got "
        f"{tuple(coefficients.shape)} for at {total}; pass those of every step.",
    )
    begin = [initial_values(spec, seed) for spec in specs] if start is None else start
    masters = [t.to(device, torch.float32, copy=True).contiguous() for t in begin]
    plan = AdapterPlan(masters, specs)
    steps = max(1, _PER_PASS // num_directions)
    for first in range(0, total, steps):
        last = min(first + steps, total)
        taken = [step for step in range(first, last) if not is_skipped[step]]
        directions = [
            Direction(seed, step, index, distribution)
            for step in taken
            for index in range(num_directions)
        ]
        factors = coefficients[taken].ravel().tolist()
        if directions:
            add_directions_(plan, directions=directions, coefficients=factors, backend=backend)
        if progress is not None:
            progress(last, total)
    return masters
