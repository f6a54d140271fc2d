"""The programs in examples/ run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import PeftConfig

from tests.support.files import run_script
from tests.support.independent import load_peft
from tests.support.source import ROOT

EXAMPLES = ROOT / "examples"


def steps_in(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+): loss [\d.]+$", output, re.M)]


def test_train(tiny_model_dir, tmp_path):
    output = run_script(EXAMPLES / "train.py", tiny_model_dir("llama"), tmp_path)
    assert steps_in(output) == list(range(20))
    before, after = map(float, re.findall(r"^loss ([\d.]+) -> ([\d.]+)", output, re.M)[0])
    assert after != before
    load_peft(tiny_model_dir("llama"), tmp_path)


@pytest.mark.sglang
@pytest.mark.slow
def test_train_in_sglang_and_serve_what_was_saved(tiny_model_dir, tmp_path):
    output = run_script(EXAMPLES / "train_sglang.py", tiny_model_dir("llama"), tmp_path)
    assert steps_in(output) == list(range(1, 21))
    assert "held-out loss" in output
    assert "20 steps, problems: []" in output
    assert PeftConfig.from_pretrained(str(tmp_path)).alora_invocation_tokens
    asked = "2 + 2 = Answer :"
    output = run_script(EXAMPLES / "serve.py", tiny_model_dir("llama"), tmp_path, asked)
    assert re.findall(r"^(base model|mine): '", output, re.M) == ["base model", "mine"]


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
