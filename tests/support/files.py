"""Data files as users have them, and what a training leaves on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def write_reviews(path: Path, long_text: str | None = None) -> Path:
    """Write a file like Rotten Tomatoes', in words of the tiny models' vocabulary."""
    lines = ["text,label,source"]
    for i in range(1560):
        lines.append(f"w{5 + i % 500} w{5 + i // 500} w{5 + 7 * i % 500},{i % 2},rotten_tomatoes")
    if long_text:
        lines += [f"w{i} {long_text},{i % 2},rotten_tomatoes" for i in range(5, 40)]
    path.write_text("\n".join(lines) + "\n")
    return path


def valid_json(text: str) -> Any:
    """Read JSON; NaN and Infinity, which Python's own reader takes, are an error."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def logged(output: Path) -> list[types.SimpleNamespace]:
    """Return what steps.jsonl has of each step, with its fields as attributes."""
    lines = (output / "steps.jsonl").read_text().splitlines()
    return [types.SimpleNamespace(**valid_json(line)) for line in lines]


def saved_weights(directory: Path) -> dict[str, Any]:
    """Return a saved adapter by canonical names."""
    tensors = load_file(directory / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".weight"
    return {name[len(prefix) : -len(suffix)]: value for name, value in tensors.items()}


def run_script(script: Path, *arguments: object, cwd: Path | None = None) -> str:
    """Run a user's program to its end; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def write_jsonl(path, rows):
    """Write a JSON object per line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
