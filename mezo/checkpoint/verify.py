"""Checks what a training has left: its trajectory, and that its adapters are the replayed ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mezo.checkpoint.identity import model_identity
from mezo.checkpoint.peft import read_peft
from mezo.checkpoint.records import read_json, read_json_lines
from mezo.checkpoint.replayed import weights_at
from mezo.checkpoint.run_directory import has_adapter, trajectory_of
from mezo.checkpoint.trajectory import Trajectory


@dataclass(frozen=True)
class FileCheck:
    """What was checked, whether it holds, and what was found."""

    name: str
    is_ok: bool
    detail: str


def verify(run: str | Path, *, model: str | None = None) -> list[FileCheck]:
    """Check a training's files against each other.

    Args:
        run: its output directory.
        model: directory or hub name of the base model; None: the one that the training names.

    Returns:
        The checks: the trajectory's records, its model, the log beside it, adapter/ and each
        checkpoint.

    Raises:
        ValueError: no trajectory there, one that is corrupt, or a theta_0 that cannot be made.
    """
    directory = Path(run)
    trajectory = trajectory_of(directory)
    count = len(trajectory.records)
    words = trajectory.cut or f"{count} steps, each with its CRC"
    found = [
        FileCheck("trajectory", trajectory.cut is None, words),
        _model_check(trajectory, model),
        _log_check(trajectory, directory),
    ]
    adapters = {directory / "adapter": _step_of_adapter(directory, count)}
    for path in directory.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdecimal():
            adapters[path] = int(path.name.removeprefix("checkpoint-"))
    for path, step in sorted(adapters.items(), key=lambda item: item[1]):
        if has_adapter(path):
            found.append(_adapter_check(trajectory, path, step))
    return found


def _step_of_adapter(directory: Path, count: int) -> int:
    """Behind which step adapter/ was saved: the last one, unless the best was put back."""
    summary = read_json(directory / "summary.json") or {}
    best = summary.get("best") or {}
    return int(best["step"]) if summary.get("is_best_loaded") and "step" in best else count


def _adapter_check(trajectory: Trajectory, path: Path, step: int) -> FileCheck:
    if step > len(trajectory.records):
        words = f"behind step {step}, which the trajectory does not have"
        return FileCheck(path.name, False, words)
    _, saved = read_peft(path)
    replayed = weights_at(trajectory, step)
    partners = trajectory.header.adapter.get("partners") or {}
    own = {name: value for name, value in saved.items() if name not in partners}
    differing = sorted(
        name
        for name in own.keys() | replayed.keys()
        if name not in own
        or name not in replayed
        or not torch.equal(own[name].view(torch.int32), replayed[name].view(torch.int32))
    )
    if differing:
        words = f"{len(differing)} of {len(replayed)} tensors differ from step {step}'s, replayed"
        return FileCheck(path.name, False, f"{words} ({differing[0]})")
    return FileCheck(path.name, True, f"step {step}, replayed bit for bit")


def _model_check(trajectory: Trajectory, model: str | None) -> FileCheck:
    name = model or trajectory.header.adapter.get("base_model")
    known = trajectory.header.model
    got = model_identity(str(name)) if name else {}
    shared = sorted(known.keys() & got.keys())
    if not shared:
        return FileCheck("model", model is None, f"{name} is not here, so it was not compared")
    if differing := [what for what in shared if known[what] != got[what]]:
        return FileCheck("model", False, f"{name}: {', '.join(differing)} differ")
    return FileCheck("model", True, f"{name}: {', '.join(shared)} agree")


def _log_check(trajectory: Trajectory, directory: Path) -> FileCheck:
    """Compare steps.jsonl with the trajectory, as far as both go."""
    log = read_json_lines(directory / "steps.jsonl")
    differing, compared = [], 0
    for line in log:
        step = line.get("step")
        if not isinstance(step, int) or not 0 <= step < len(trajectory.records):
            differing.append(step)
            continue
        compared += 1
        theirs = trajectory.records[step].coefficients
        ours = np.asarray(line.get("coefficients", ()), dtype=np.float32)
        if not np.array_equal(ours, np.asarray(theirs, dtype=np.float32)):
            differing.append(step)
    if differing:
        words = f"{len(differing)} lines of steps.jsonl differ, the first for step {differing[0]}"
        return FileCheck("log", False, words)
    return FileCheck("log", True, f"{compared} steps of steps.jsonl agree")
