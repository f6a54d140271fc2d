"""Output directories and files: whole files, or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mezo._inputs import require


def replace_file(path: Path, content: bytes) -> None:
    """Put a whole new file in a file's place, or leave the old one.

    Afterwards it is on the disk, and so is its name. Who has mapped the old one keeps that.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> Path:
    """Write a file that can be made again, into a directory that is made if needed.

    Returns:
        ``path``.

    Raises:
        OSError: it cannot be written; part of it may be there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def check_output(directory: str | Path, files: Sequence[str]) -> Path:
    """Make an output directory and check that files can be written there, before it is needed.

    Args:
        directory: where files will be written; it is made if needed.
        files: names of the files.

    Returns:
        The directory.

    Raises:
        ValueError: something stands in its way, or nothing can be written there.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if path.exists() and not path.is_dir():
            found = "a file"
        else:
            found = f"{type(error).__name__} ({error.strerror})"
        raise ValueError(
            f"output: {path} must be a directory that can be written to, got {found}; choose "
            "another directory."
        ) from error
    for name in files:
        require(
            not (path / name).is_dir(),
            f"output: {path / name} must be a file or new, got a directory; move it away.",
        )
    return path
