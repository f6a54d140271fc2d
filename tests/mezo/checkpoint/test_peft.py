"""Initial values, assembly of shards, PEFT files."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch
from peft import LoraConfig

import mezo
from mezo.checkpoint.peft import assemble, save_peft
from mezo.core.init import initial_values
from mezo_kernels import Direction, TensorSpec, sample
from tests.support.independent import load_peft, lora_parameters, peft_model
from tests.support.tiny import LINEARS, load_model

NAME = "model.layers.0.self_attn.q_proj.lora_A"


def test_lora_a_is_kaiming_uniform_and_a_function_of_seed_and_name():
    values = initial_values(TensorSpec(NAME, (64, 1000)), seed=3)
    bound = 1 / math.sqrt(1000)
    assert values.dtype == torch.float32
    assert values.abs().max() < bound
    assert values.abs().max() > 0.999 * bound
    n = values.numel()
    assert abs(values.double().mean()) < 5 * bound / math.sqrt(3 * n)
    # Var of a uniform is bound^2 / 3; its sample variance has variance 4 bound^4 / (45 n).
    variance = values.double().var().item()
    assert abs(variance - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / (45 * n))
    assert torch.equal(values, initial_values(TensorSpec(NAME, (64, 1000)), seed=3))
    for other in (
        initial_values(TensorSpec(NAME, (64, 1000)), seed=4),
        initial_values(TensorSpec(NAME.replace("q", "k"), (64, 1000)), seed=3),
    ):
        correlation = torch.corrcoef(torch.stack([values.reshape(-1), other.reshape(-1)]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)
    # Domain 3 shares no words with the first direction.
    z = sample(TensorSpec(NAME, (64, 1000)), Direction(3, 0))
    correlation = torch.corrcoef(torch.stack([values.reshape(-1), z.reshape(-1)]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)


def test_lora_b_is_zero():
    spec = TensorSpec("model.layers.0.self_attn.q_proj.lora_B", (5, 3))
    assert torch.equal(initial_values(spec, 7), torch.zeros(5, 3))


def test_a_shard_gets_the_slice_of_the_whole():
    whole = initial_values(TensorSpec(NAME, (8, 37)), 2**63 + 1)
    for row0, col0, shape in ((0, 0, (8, 37)), (3, 5, (4, 17)), (7, 36, (1, 1)), (0, 18, (8, 19))):
        shard = initial_values(TensorSpec(NAME, shape, row0, col0, (8, 37)), 2**63 + 1)
        rows, cols = slice(row0, row0 + shape[0]), slice(col0, col0 + shape[1])
        assert torch.equal(shard, whole[rows, cols])


def test_assemble_puts_shards_together_and_finds_diverged_ranks():
    whole = torch.randn(4, 6)
    cut = TensorSpec("a.lora_B", (2, 6), 0, 0, (4, 6)), TensorSpec("a.lora_B", (2, 6), 2, 0, (4, 6))
    replicated = TensorSpec("a.lora_A", (4, 6), global_shape=(4, 6))
    shards = [(cut[0], whole[:2]), (replicated, whole), (cut[1], whole[2:]), (replicated, whole)]
    result = assemble(shards)
    assert torch.equal(result["a.lora_B"], whole)
    assert torch.equal(result["a.lora_A"], whole)
    other = whole.clone()
    other.view(torch.int32)[1, 2] += 1  # one bit
    with pytest.raises(RuntimeError, match=r"same bits of a.lora_A, .* the ranks have diverged"):
        assemble([*shards[:3], (replicated, other)])
    with pytest.raises(RuntimeError, match=r"got none for parts of \['a.lora_B'\]"):
        assemble(shards[:2])


def test_saved_files_load_in_peft_bit_for_bit(tiny_model_dir, tmp_path):
    config = mezo.MeZOConfig(rank=4, alpha=6, target_modules=LINEARS, seed=1)
    directory = tiny_model_dir("qwen2")
    names = {n: tuple(p.shape) for n, p in lora_parameters(peft_model(directory, config)).items()}
    weights = {name: torch.randn(shape) for name, shape in names.items()}
    save_peft(weights, config, tmp_path / "new" / "adapter", base_model=directory)
    model = load_peft(directory, tmp_path / "new" / "adapter")
    loaded = lora_parameters(model)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert model.peft_config["default"].lora_alpha == 6


def test_saving_needs_no_peft(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it raises
    save_peft({NAME: torch.zeros(4, 64)}, mezo.MeZOConfig(rank=4), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("tokens", [None, [5, 6]], ids=["ordinary", "activated"])
def test_the_config_is_the_one_that_peft_would_write(tmp_path, tokens):
    config = mezo.MeZOConfig(rank=4, alpha=6, target_modules=["v_proj", "q_proj"])
    theirs = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        base_model_name_or_path="a/model",
        task_type="CAUSAL_LM",
        inference_mode=True,
        alora_invocation_tokens=tokens,
    )
    ours = save_peft(
        {NAME: torch.zeros(4, 64)},
        config,
        tmp_path / "ours",
        base_model="a/model",
        alora_invocation_tokens=tokens,
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, yours = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    )
    for fields in (mine, yours):
        fields["target_modules"] = sorted(fields["target_modules"])
    assert all(yours[name] == value for name, value in mine.items())
    loaded = LoraConfig.from_pretrained(str(ours))
    theirs.peft_version = loaded.peft_version
    assert loaded == theirs


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    config = mezo.MeZOConfig(rank=4)
    save_peft({NAME: torch.zeros(4, 64)}, config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_peft({NAME: torch.ones(4, 64)}, config, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("up_proj",), ("k_proj", "gate_proj")])
def test_a_saved_run_has_whole_stacks_and_gives_peft_the_same_bits(
    tiny_model_dir, tmp_path, architecture, modules
):
    directory = tiny_model_dir(architecture)
    if architecture == "opt" and modules != ("q_proj", "v_proj"):
        modules = ("fc1",) if modules == ("up_proj",) else ("k_proj", "fc2")
    config = mezo.MeZOConfig(rank=4, alpha=8, target_modules=modules, seed=2)
    with mezo.attach(load_model(directory), config) as run:
        run.apply_update([-0.05])
        run.save(tmp_path / "whole")
        trained = run.weights()
    save_peft(trained, config, tmp_path / "trained")
    groups = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    expected = set(modules).union(*(g for g in groups if g & set(modules)))
    whole, partial = (load_peft(directory, tmp_path / name) for name in ("whole", "trained"))
    assert set(whole.peft_config["default"].target_modules) == expected
    assert {name.split(".")[-2] for name in lora_parameters(whole)} == expected
    for name, value in lora_parameters(whole).items():
        assert torch.equal(value, trained.get(name, torch.zeros_like(value)))
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, partial(ids).logits)
        assert not torch.equal(whole(ids).logits, load_model(directory)(ids).logits)
