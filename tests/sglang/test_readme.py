"""What the README says a new user can do, done as it stands there."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest
from independent import load_peft
from tiny import random_batch

import mezo
from mezo import assets

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def test_the_python_block_runs_on_the_real_model(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"path/to/model"' in block
    script = tmp_path / "quickstart.py"
    shown = "        print(result.step, result.status.name, result.loss)\n"
    block = block.replace('"path/to/model"', repr(str(assets.model_dir())))
    block = re.sub(r"(        result = mezo.step.*\n)", lambda m: m.group(1) + shown, block)
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    steps = re.findall(r"^(\d+) OK [\d.]+$", done.stdout, re.MULTILINE)
    assert steps == [str(i) for i in range(10)]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_finetune_from_a_path_starts_and_ends_an_engine(tiny_model_dir, tmp_path, no_engine_noise):
    directory = tiny_model_dir("llama")
    config = mezo.MezoConfig(rank=2, target_modules=("q_proj", "o_proj"), lr=1e-3)
    batch = random_batch(random.Random(0))
    summary = mezo.finetune(
        directory, repeat(batch), num_steps=4, config=config, held_out=[batch], output=tmp_path
    )
    assert summary.steps == 4
    assert summary.after.loss != summary.before.loss
    load_peft(directory, tmp_path)
