"""The triton backend of attention and label losses, in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from interpreted_paired import CHECKS

PROGRAM = Path(__file__).parents[1] / "support" / "interpreted_paired.py"


@pytest.fixture(scope="module")
def results():
    """What each check said, in a process whose triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("MEZO_KERNELS_BACKEND", None)
    command = [sys.executable, "-W", "error", str(PROGRAM)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] is None, results[check]
