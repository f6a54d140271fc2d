"""Ctrl-C at a chosen moment, and what a training leaves then."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo.checkpoint.trajectory import read
from tests.support.files import logged, saved_weights, valid_json
from tests.support.independent import check_replay


def interrupted(call: Callable[[], object], *, after: float) -> None:
    """Run ``call`` and send SIGINT to this process after some seconds; it raises in here."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))

    def run() -> None:
        timer.start()
        try:
            call()
        finally:
            timer.join(10)

    with pytest.raises(KeyboardInterrupt):
        run()


def check_interrupted(errors: str, output: Path) -> dict[str, Any]:
    """Check what an interrupted `mezo train` of 100000 steps says and keeps; its summary."""
    summary = valid_json((output / "summary.json").read_text())
    said = [line for line in errors.splitlines() if line.startswith("interrupted: ")]
    assert said == [
        f"interrupted: training stopped after {summary['steps']} of 100000 steps "
        f"(KeyboardInterrupt); their weights are in {output}/adapter."
    ]
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"go on with: mezo train --resume_from_checkpoint {output}"
    steps = logged(output)
    assert summary["steps"] == len(steps) == len(read(output / "trajectory.mezo").records)
    check_replay(steps, saved_weights(output / "adapter"), 0)
    return summary
