"""theta at any step of a run, from its seed and coefficients: without a model or an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mezo._inputs import checked_integer, require
from mezo.core.init import initial_values
from mezo_kernels import AdapterPlan, Direction, TensorSpec, add_directions_

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# Normals per call: a call is long beside its launch, and short enough for a progress bar and for
# Ctrl-C.
_NORMALS_PER_CALL = 1 << 27


def replay(
    specs: Sequence[TensorSpec],
    *,
    seed: int,
    distribution: str,
    num_directions: int,
    coefficients: ArrayLike | torch.Tensor,
    is_skipped: ArrayLike | torch.Tensor | None = None,
    at: int | None = None,
    start: Sequence[torch.Tensor] | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """Return the adapter's tensors as training had them after ``at`` steps, bit for bit.

        theta <- fma(c[i, k], z(seed, step i, direction k), theta)   for i < at, for k < q, in order

    Args:
        specs: the N tensors. Shards are fine: a rank replays its own.
        seed: the run's seed.
        distribution: of the directions, "gaussian" or "rademacher".
        num_directions: q, directions per step.
        coefficients: `[S, q]`, rounded to fp32; row i is step i. An array or a CPU tensor.
        is_skipped: `[S]` bool, the steps that changed nothing, whose coefficients are not read;
            None: no step was skipped.
        at: how many steps to replay, those before step ``at``; None: all of them.
        start: N fp32 tensors of the specs' shapes to begin with in place of theta_0; they are not
            written. To go on from a snapshot of step s, pass it here and skip the first s steps.
        backend: "reference" | "cpu" | "triton" | "cuda" | None (the best one for the device).
        device: where the tensors are computed; None: a GPU where there is one and the backend is
            not one of the CPU's, else the CPU.
        progress: called with (steps done, steps to do) at the beginning and after each part.

    Returns:
        N fp32 tensors of the specs' shapes on the device; the caller owns them.

    Raises:
        ValueError: coefficients, skipped steps or start of another shape or dtype, ``at`` out of
            range, a coefficient that is not finite in fp32, an unknown backend or distribution.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: those of `add_directions_`: the bits are the same on every backend and device, for
    shards and for any number of threads. Graph-safe: no. Cost: one z per element, direction and
    step; theta is read and written once per call, which has many steps.
    """
    done, factors = _checked_steps(num_directions, coefficients, is_skipped, at)
    target = _device_of(backend, device)
    tensors = _first_values(specs, seed, start, target)
    plan = AdapterPlan(tensors, specs)
    # Without directions it only checks the backend, ahead of the work.
    add_directions_(plan, backend=backend)
    progress = progress or (lambda done, of: None)
    progress(0, done)
    size = sum(math.prod(spec.shape) for spec in specs)
    steps_per_call = max(1, _NORMALS_PER_CALL // max(1, size * num_directions))
    for first in range(0, done, steps_per_call):
        stop = min(first + steps_per_call, done)
        steps = [step for step in range(first, stop) if factors[step] is not None]
        directions = [
            Direction(seed, step, index, distribution)
            for step in steps
            for index in range(num_directions)
        ]
        values = [c for step in steps for c in factors[step] or ()]
        add_directions_(plan, directions=directions, coefficients=values, backend=backend)
        progress(stop, done)
    return tensors


def _checked_steps(
    num_directions: int,
    coefficients: ArrayLike | torch.Tensor,
    is_skipped: ArrayLike | torch.Tensor | None,
    at: int | None,
) -> tuple[int, list[list[float] | None]]:
    """The number of steps to replay, and the coefficients of each; None for a skipped one."""
    with np.errstate(over="ignore"):  # what is too large for fp32 becomes inf, refused below
        values = np.asarray(coefficients, dtype=np.float32)
    require(
        values.ndim == 2 and values.shape[1] == num_directions,
        f"replay: coefficients must be of shape (steps, {num_directions}), one column per "
        f"direction, got {values.shape}; pass those of the run as they were recorded.",
    )
    steps = len(values)
    skipped = np.zeros(steps, dtype=bool) if is_skipped is None else np.asarray(is_skipped)
    require(
        skipped.shape == (steps,) and skipped.dtype == bool,
        f"replay: is_skipped must be {steps} bools, one per step, got {skipped.dtype} of shape "
        f"{skipped.shape}; pass those of the run as they were recorded.",
    )
    if at is None:
        at = steps
    at = checked_integer(
        "replay: at",
        at,
        0,
        steps + 1,
        f"a number of steps from 0 to {steps}",
        "the run has no more steps than that",
    )
    wrong = np.flatnonzero(~skipped[:at] & ~np.isfinite(values[:at]).all(axis=1))
    require(
        not wrong.size,
        f"replay: coefficients must be finite in fp32, got {wrong.size} steps where they are not, "
        f"the first is step {wrong[0] if wrong.size else None}; mark steps that changed nothing "
        "as skipped.",
    )
    rows = values[:at].tolist()
    return at, [None if skip else row for skip, row in zip(skipped[:at], rows, strict=True)]


def _device_of(backend: str | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    is_for_cpu = backend in ("reference", "cpu") or not torch.cuda.is_available()
    return torch.device("cpu" if is_for_cpu else "cuda")


def _first_values(
    specs: Sequence[TensorSpec],
    seed: int,
    start: Sequence[torch.Tensor] | None,
    device: torch.device,
) -> list[torch.Tensor]:
    """New tensors on the device with theta_0, or with what ``start`` holds."""
    if start is None:
        return [initial_values(spec, seed).to(device) for spec in specs]
    require(
        len(start) == len(specs),
        f"replay: start must have one tensor per spec, {len(specs)}, got {len(start)}; pass the "
        "tensors in the order of the specs.",
    )
    for spec, tensor in zip(specs, start, strict=True):
        require(
            tuple(tensor.shape) == spec.shape and tensor.dtype == torch.float32,
            f"replay: start of {spec.name} must be float32 of shape {spec.shape}, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}; pass the fp32 values of this shard.",
        )
    layout = torch.contiguous_format
    return [t.detach().to(device, copy=True, memory_format=layout) for t in start]
