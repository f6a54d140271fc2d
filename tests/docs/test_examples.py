"""The programs in examples/ run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import PeftConfig
from typer.testing import CliRunner

from mezo.cli import app
from tests.support.files import run_script
from tests.support.independent import load_peft
from tests.support.source import ROOT

EXAMPLES = ROOT / "examples"


def steps_in(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+): loss [\d.]+$", output, re.M)]


def test_finetune(tiny_model_dir, tmp_path):
    model = tiny_model_dir("llama")
    output = run_script(EXAMPLES / "finetune.py", model, tmp_path, "transformers")
    assert steps_in(output) == list(range(1, 41))
    before, after = map(float, re.findall(r"^loss ([\d.]+) -> ([\d.]+), \(\)", output, re.M)[0])
    assert after != before
    load_peft(model, tmp_path / "adapter")


def test_own_data(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = tiny_model_dir("llama")
    words = f"train --config examples/own_data.yaml --model {model} --output {tmp_path}"
    more = ["--engine", "transformers", "--max_steps", "4", "--set", "template.invocation=' w9'"]
    result = CliRunner().invoke(app, [*words.split(), *more])
    assert result.exit_code == 0, result.output
    assert "4 of 24 examples are held out" in result.output
    fields = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert fields.alora_invocation_tokens == [9]


@pytest.mark.sglang
@pytest.mark.slow
def test_train_in_sglang_and_serve_what_was_saved(tiny_model_dir, tmp_path):
    output = run_script(EXAMPLES / "step_in_engine.py", tiny_model_dir("llama"), tmp_path)
    assert steps_in(output) == list(range(1, 21))
    assert "held-out loss" in output
    assert "20 steps, problems: []" in output
    assert PeftConfig.from_pretrained(str(tmp_path)).alora_invocation_tokens
    asked = "2 + 2 = Answer :"
    output = run_script(EXAMPLES / "serve_activated.py", tiny_model_dir("llama"), tmp_path, asked)
    assert re.findall(r"^(base model|mine): '", output, re.M) == ["base model", "mine"]


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")]
    assert len(names) == 4
    assert all(name in text for name in names)
