"""A scheduler dies, or the caller ends: exceptions and exit codes are the caller's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

_SCRIPT = """
import os, random, signal, sys, time, warnings
import mezo
from mezo.core.messages import Hello
from tests.support.tiny import random_batch

warnings.simplefilter("ignore")

def main(model_dir, has_served):
    config = mezo.MeZOConfig(rank=4)
    engine = mezo.launch_engine(model_dir, config)
    batch = random_batch(random.Random(0))
    request = {"input_ids": [1, 5, 9], "sampling_params": {"max_new_tokens": 2}}
    try:
        run = mezo.attach(engine, config)
        run.step(batch)
        if has_served:
            engine.generate(**request)
        pid = run.session.call(Hello()).pids[0]
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


_ENDS = """
import random, sys, warnings
import mezo
from tests.support.tiny import random_batch

warnings.simplefilter("ignore")

if __name__ == "__main__":
    config = mezo.MeZOConfig(rank=4)
    engine = mezo.launch_engine(sys.argv[1], config)
    run = mezo.attach(engine, config)
    run.step(random_batch(random.Random(0)))
    print("pids", *engine.get_all_child_pids(), flush=True)
    sys.exit(3)
"""


def run_script(text, tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(text)
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_process_that_ends_with_a_run_open(tiny_model_dir, tmp_path):
    done = run_script(_ENDS, tmp_path, tiny_model_dir("llama"))
    assert done.returncode == 3, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("pids ")]
    assert line.split()[1:]
    assert not any(psutil.pid_exists(int(pid)) for pid in line.split()[1:])


@pytest.mark.parametrize("has_served", [False, True], ids=["no request yet", "has served"])
def test_a_killed_scheduler(tiny_model_dir, tmp_path, has_served):
    done = run_script(_SCRIPT, tmp_path, tiny_model_dir("llama"), str(has_served))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(line.startswith("step:") and "got 1 dead (exit code -9)" in line for line in lines)
    assert any(line.startswith("save:") and "got 1 dead (exit code -9)" in line for line in lines)
    assert sum(line.startswith("generate:") for line in lines) == 2
    assert lines[-2:] == ["finally", "alive"]
