"""Checks in Triton's interpreter: in their own process, because triton decides at its import."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch


def checks_of(namespace: Mapping[str, Any]) -> dict[str, Callable[..., None]]:
    """The functions `check_*` of a module, by what follows."""
    return {n.removeprefix("check_"): f for n, f in namespace.items() if n.startswith("check_")}


def report(checks: Mapping[str, Callable[..., None]], *arguments: Any) -> None:
    """Run all checks and print, as one line of JSON, None or the traceback of each."""
    torch.set_num_threads(1)
    # The interpreter's dot. BLAS may add an element's products up by its place in the matrix; a GPU
    # does not, and checks of bits rely on that.
    numpy.matmul = functools.partial(numpy.einsum, "...ij,...jk->...ik")
    results: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check(*arguments)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def run_interpreted(program: str, *flags: str) -> dict[str, Any]:
    """The last line that a module prints, in a process whose triton interprets.

    Args:
        program: its dotted name.
        flags: options of Python, e.g. "-W", "error".
    """
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    environment.pop("MEZO_KERNELS_BACKEND", None)
    command = [sys.executable, *flags, "-m", program]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return results
