"""`mezo doctor --model`: one line a check, and an exit code."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from mezo.cli import app
from mezo.diagnostics import comparison, doctor
from mezo.engines import lora_layers
from tests.support.tiny import load_model


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def checks(output):
    """{name: word} of the lines of checks."""
    words = ("ok", "FAILED", "skipped")
    lines = [line.split(": ") for line in output.splitlines()]
    return {parts[1]: parts[0] for parts in lines if parts[0] in words}


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt"])
def test_a_sound_model_on_transformers(tiny_model_dir, architecture):
    result = run("--model", tiny_model_dir(architecture), "--engine", "transformers")
    assert result.exit_code == 0, result.output
    found = checks(result.output)
    assert found.pop("against transformers") == "skipped"
    assert len(found) == 7
    assert set(found.values()) == {"ok"}
    targets = {
        "llama": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        "phi3": "qkv_proj, o_proj, gate_up_proj, down_proj",
        "opt": "q_proj, k_proj, v_proj, out_proj, fc1, fc2",
    }
    assert f"adapter on {targets[architecture]}\n" in result.output


def test_a_failed_check_gives_1(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(lora_layers.LoraLinear, "_delta", lambda layer, x, name: torch.zeros(()))
    result = run("--model", tiny_model_dir("llama"), "--engine", "transformers")
    assert result.exit_code == 1
    assert checks(result.output)["adapter applied"] == "FAILED"


def test_layers_that_cannot_be_trained_give_1(tiny_model_dir):
    result = run(
        *("--model", tiny_model_dir("phi3"), "--engine", "transformers"),
        *("--target-modules", "qkv_proj,q_proj"),
    )
    assert result.exit_code == 1
    assert "FAILED: attach: target_modules must name linear layers" in result.output


def test_wrong_use_gives_2(tmp_path):
    for arguments, message in (
        (("--model", "x", "--engine", "vllm"), "engine must be one of"),
        (("--model", str(tmp_path / "none")), "model must be a checkpoint that transformers knows"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.output
    assert run("--models", "x").exit_code == 2


def test_without_a_model_nothing_is_started():
    result = run()
    assert result.exit_code == 0
    assert "engine transformers: usable" in result.output


def test_what_cannot_be_compared_says_why(tiny_model_dir, tmp_path, monkeypatch):
    directory = tiny_model_dir("llama")
    assert isinstance(comparison._reference(directory), comparison._Reference)
    monkeypatch.setattr(comparison, "available_memory", lambda: 10**5)
    assert "checkpoint needs 0.0 GB of memory here" in comparison._reference(directory)
    monkeypatch.undo()
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    path = copy / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"architectures": ["OwnForCausalLM"]}, "transformers has no class OwnForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"model_type": "own"}, "transformers cannot read the config of"),
    ):
        path.write_text(json.dumps({**config, **change}))
        assert message in comparison._reference(str(copy))


def test_half_precision_is_taken_where_single_does_not_fit(tiny_model_dir, tmp_path, monkeypatch):
    load_model(tiny_model_dir("llama")).bfloat16().save_pretrained(tmp_path)
    single = 4 * sum(p.numel() for p in load_model(tmp_path).parameters())
    for free, dtype in ((2 * single, torch.float32), (single, torch.bfloat16)):
        monkeypatch.setattr(comparison, "available_memory", lambda free=free: free)
        assert comparison._reference(str(tmp_path)).dtype == dtype


def test_a_window_that_no_row_exceeds_is_said():
    words = comparison._window_words(64, [3, 60], {"base": [0.0, 0.0], "adapted": [0.0, 0.0]})
    assert "sliding window of 64 tokens, which no row that this engine accepts exceeds" in words
    words = comparison._window_words(8, [3, 9], {"base": [1e-6, 0.5], "adapted": [0.0, 0.75]})
    assert "1e-06 nats in rows within it, 0.75 in longer ones" in words


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 8}, 8),
        ({"sliding_window": None}, None),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, 8),
        ({}, None),
    ],
)
def test_windows_are_read_off_the_config(fields, window):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**fields))
    assert comparison._window(config) == window


def test_free_memory_is_the_hosts():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < comparison.available_memory() < total


@pytest.mark.sglang
def test_sglangs_mistral_has_no_sliding_window(tiny_model_dir):
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's, as it starts
        assert not doctor.diagnose(tiny_model_dir("mistral"), echo=lines.append)
    *sound, last = lines[1:]
    assert all(line.startswith("ok: ") for line in sound)
    assert len(sound) == 11
    assert last.startswith("FAILED: against transformers: largest difference of a token's")
    within, beyond = (float(last.split(" nats in rows")[0].split()[-1]), float(last.split()[-4]))
    assert within < 1e-5
    assert beyond > 1e-2
