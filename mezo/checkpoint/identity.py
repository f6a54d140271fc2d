"""What tells a model, a set of examples and an adapter's beginning from others: their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_LENGTH = 8  # bytes in front of the header of a safetensors file, which are its length


def model_identity(model: str) -> dict[str, str]:
    """Return the hashes of a model's config and of its weights' index.

    Weights in one file have no index; the header of the file stands in for it. What is not there,
    or cannot be read, is left out.

    Args:
        model: directory or hub name.

    Returns:
        {"config_sha256", "index_sha256"}: hexadecimal, as far as there are such files.
    """
    found = {}
    if (path := _file(model, "config.json")) is not None:
        found["config_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if (path := _file(model, _INDEX)) is not None:
        found["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    elif (path := _file(model, _WEIGHTS)) is not None:
        with path.open("rb") as file:
            length = file.read(_LENGTH)
            header = file.read(int.from_bytes(length, "little"))
        found["index_sha256"] = hashlib.sha256(length + header).hexdigest()
    return found


def rows_identity(rows: Iterable[Any]) -> str:
    """Return a hash of token rows and whatever else makes training examples, in their order.

    Args:
        rows: values whose ``repr`` says what they are: tuples of integers, integers, None.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _file(model: str, name: str) -> Path | None:
    """A file of a model, where it lies on this host."""
    path = Path(model)
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, name)
    except ValueError:  # no hub name
        return None
    return Path(found) if isinstance(found, str) else None
