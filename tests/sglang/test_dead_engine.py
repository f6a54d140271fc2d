"""A scheduler dies: the caller gets an exception instead of being killed by SGLang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

_SCRIPT = """
import os, random, signal, sys, time, warnings
import mezo
from tiny import random_batch

warnings.simplefilter("ignore")

def main(model_dir, has_served):
    config = mezo.MezoConfig(rank=4)
    engine = mezo.launch_engine(model_dir, config)
    batch = random_batch(random.Random(0))
    request = {"input_ids": [1, 5, 9], "sampling_params": {"max_new_tokens": 2}}
    try:
        run = mezo.attach(engine, config)
        run.step(batch)
        if has_served:
            engine.generate(**request)
        pid = run.session.call("hello")["pids"][0]
        try:
            os.kill(pid, signal.SIGKILL)
            for _ in range(100):
                time.sleep(0.1)
                run.step(batch)
        except RuntimeError as error:
            print("step:", error, flush=True)
        time.sleep(3)  # for SGLang's watchdog, which sends SIGQUIT
        try:
            run.save("never")
        except RuntimeError as error:
            print("save:", error, flush=True)
        for _ in range(2):
            try:
                engine.generate(**request)
            except RuntimeError as error:
                print("generate:", error, flush=True)
        run.close()
    finally:
        print("finally", flush=True)
        engine.shutdown()
    print("alive", flush=True)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "True")
"""


@pytest.mark.parametrize("has_served", [False, True], ids=["no request yet", "has served"])
def test_a_killed_scheduler(tiny_model_dir, tmp_path, has_served):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    support = str(Path(__file__).parents[1] / "support")
    paths = [support, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script), tiny_model_dir("llama"), str(has_served)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(line.startswith("step:") and "got 1 dead (exit code -9)" in line for line in lines)
    assert any(line.startswith("save:") and "got 1 dead (exit code -9)" in line for line in lines)
    assert sum(line.startswith("generate:") for line in lines) == 2
    assert lines[-2:] == ["finally", "alive"]
