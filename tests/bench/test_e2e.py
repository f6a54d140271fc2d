"""The end-to-end GPU benchmark without a GPU: its cases, its shapes, its baseline."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mezo
from tests.support.tiny import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import decoders

    return decoders


def test_dry_run_prints_the_cases():
    result = subprocess.run(
        ["bench/gpu/e2e.sh", "--dry-run"],
        cwd=ROOT,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 12
    assert lines[0] == "opt-1.3b b16 sst2: 1.31 G parameters"


@pytest.mark.parametrize("name", ["opt-1.3b", "opt-13b", "llama-3.1-8b"])
def test_shapes_have_the_sizes_that_they_print(parts, name):
    shape = parts.shapes()[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        shape.num_parameters(), rel=0.01
    )


def test_the_plain_loop_is_one_forward_a_sign_and_puts_theta_back(parts, tiny_model_dir):
    config = parts.make_config(lr=1e-3, eps=1e-2)
    batch = parts.make_batch(random.Random(0), 3, (4, 9), 500)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        loop = parts.PlainLoop(run, batch)
        assert loop.loss() == run.evaluate(batch).loss
        before = [parameter.clone() for parameter in loop.parameters]
        loop.step()
        moved = [(a - b).abs().max() for a, b in zip(before, loop.parameters, strict=True)]
        assert 0 < max(moved) < 0.1
        assert loop.loss() != run.evaluate(batch, base=True).loss
