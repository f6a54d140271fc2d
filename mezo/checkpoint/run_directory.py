"""What a training has left in its directory: its settings, the adapter, the base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo._inputs import require
from mezo.checkpoint.peft import ADAPTER_FILES
from mezo.checkpoint.trajectory import Trajectory, read

TRAJECTORY, EVALUATIONS = "trajectory.mezo", "evaluations.jsonl"


def adapter_directory(run: str | Path) -> Path:
    """Return where a run's adapter is: its folder adapter/, or ``run`` if that is an adapter.

    Raises:
        ValueError: there is none.
    """
    path = Path(run)
    for directory in (path / "adapter", path):
        if (directory / ADAPTER_FILES[0]).is_file():
            return directory
    found = "no such directory" if not path.is_dir() else "a directory without an adapter"
    raise ValueError(
        f"run: {path} must be the output directory of a training, with adapter/ in it, got "
        f"{found}; pass what `mezo train` got as output."
    )


def trajectory_of(run: str | Path) -> Trajectory:
    """Read the trajectory of a run's directory, or the file itself.

    Raises:
        ValueError: there is none, or see `mezo.checkpoint.trajectory.read`.
    """
    path = Path(run)
    path = path / TRAJECTORY if path.is_dir() else path
    require(
        path.is_file(),
        f"run: {path} must be a file, got none; pass the output directory of a training.",
    )
    return read(path)


def has_adapter(directory: Path) -> bool:
    """Whether both of PEFT's files are there."""
    return all((directory / name).is_file() for name in ADAPTER_FILES)


def read_summary(run: str | Path) -> dict[str, Any]:
    """Return what a run's summary.json holds.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = Path(run) / "summary.json"
    require(
        path.is_file(),
        f"run: {path} must be a file, got none; pass the output directory of a training that has "
        "ended, which writes it last.",
    )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"run: {path} must be JSON, got {error}; copy the training's directory again."
        ) from error
    require(
        isinstance(summary, dict) and isinstance(summary.get("config"), dict),
        f"run: {path} must have the run's settings under 'config', got none; pass the output "
        "directory of a training.",
    )
    return dict(summary)


def base_model_of(fields: Mapping[str, Any], model: str | Path | None) -> str:
    """Return the base model of an adapter: ``model`` if given, else what its config names.

    Args:
        fields: of adapter_config.json.
        model: directory or hub name, from the user.

    Raises:
        ValueError: neither is there, or a path that is not there any more.
    """
    name = str(model or fields.get("base_model_name_or_path") or "")
    is_gone = Path(name).expanduser().is_absolute() and not Path(name).expanduser().exists()
    found = "a directory that is not there" if is_gone else "none"
    require(
        bool(name) and not is_gone,
        f"run: the adapter's base model must be a directory or a hub name, got {name or 'none'}"
        f"{', ' + found if is_gone else ''}; say where it is with model (--model).",
    )
    return name


def loading_of(run: str | Path, *, has_own_model: bool) -> dict[str, Any]:
    """Return how a run's base model was loaded, by the names of transformers' from_pretrained.

    Args:
        run: the output directory of a training; of an adapter only nothing is known.
        has_own_model: whether the user has named another model, which has no such revision.

    Raises:
        ValueError: a summary.json that cannot be read.
    """
    summary = read_summary(run) if (Path(run) / "summary.json").is_file() else {}
    found = {"trust_remote_code": bool(summary.get("trust_remote_code"))}
    return found if has_own_model else {**found, "revision": summary.get("model_revision")}
