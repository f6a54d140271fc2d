"""Ctrl-C in a terminal goes to every process of the group, SGLang's too; the adapter is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.files import saved_weights, write_reviews
from tests.support.independent import load_peft
from tests.support.interrupts import check_interrupted
from tests.support.source import ROOT

pytestmark = pytest.mark.sglang


def wait_for_steps(process: subprocess.Popen, log: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_of_a_terminal_saves_the_adapter(tiny_model_dir, tmp_path):
    model, output = tiny_model_dir("llama"), tmp_path / "out"
    data = write_reviews(tmp_path / "reviews.csv")
    errors = tmp_path / "stderr"
    arguments = (
        f"train --task rotten_tomatoes --engine sglang --model {model} --data {data} "
        f"--output {output} --steps 100000 "
        "--batch-size 4 --eval-examples 8 --rank 2 --lr 1e-4"
    )
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "mezo", *arguments.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # a process group of its own, as a shell makes one
        )
        try:
            wait_for_steps(process, output / "steps.jsonl", 6)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=120) == 130, errors.read_text()[-4000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    check_interrupted(errors.read_text(), output)
    load_peft(model, output / "adapter")
    weights = saved_weights(output / "adapter")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
