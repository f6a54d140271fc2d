"""The adapter of a trajectory at any step, without a model or an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mezo._inputs import require
from mezo.checkpoint.peft import save_peft
from mezo.checkpoint.replay import replay
from mezo.checkpoint.trajectory import Trajectory, theta_0_hash
from mezo.config import MeZOConfig
from mezo.core.init import initial_values


def weights_at(
    trajectory: Trajectory,
    at: int | None = None,
    *,
    backend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the adapter behind some steps, bit for bit as training had it.

    Args:
        trajectory: from `mezo.checkpoint.trajectory.read`.
        at: how many steps; None: all of them.
        backend: of the kernels; None: the best one here.
        progress: told (steps done, of how many).

    Returns:
        {canonical name: fp32 tensor on the CPU}.

    Raises:
        ValueError: more steps than there are, or a theta_0 that this host does not make again.
        RuntimeError: the backend is not usable here.
    """
    header, count = trajectory.header, len(trajectory.records)
    at = count if at is None else at
    require(
        0 <= at <= count,
        f"replay: at must be between 0 and the {count} steps of the trajectory, got {at}; choose "
        "one of them.",
    )
    specs = header.specs
    start = [initial_values(spec, header.seed) for spec in specs]
    require(
        theta_0_hash({s.name: t for s, t in zip(specs, start, strict=True)}) == header.theta_0,
        "replay: theta_0 must have the hash that the trajectory has, got another one; use the "
        "mezo-sglang that began the training.",
    )
    values = replay(
        specs,
        seed=header.seed,
        distribution=header.distribution,
        num_directions=header.num_directions,
        coefficients=trajectory.coefficients,
        is_skipped=trajectory.is_skipped,
        at=at,
        start=start,
        backend=backend,
        progress=progress,
    )
    return {spec.name: value.cpu() for spec, value in zip(specs, values, strict=True)}


def write_adapter(
    trajectory: Trajectory,
    directory: str | Path,
    at: int | None = None,
    *,
    backend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the adapter behind some steps as PEFT's two files; see `weights_at`.

    Returns:
        The directory.

    Raises:
        OSError: it cannot be written.
    """
    header, adapter = trajectory.header, trajectory.header.adapter
    return save_peft(
        weights_at(trajectory, at, backend=backend, progress=progress),
        MeZOConfig(**header.config),
        directory,
        base_model=adapter.get("base_model"),
        alora_invocation_tokens=adapter.get("alora_invocation_tokens"),
        partners=adapter.get("partners"),
    )
