"""Initial values, assembly of shards, PEFT files."""

from __future__ import annotations

import math

import pytest
import torch
from independent import load_peft, lora_parameters, peft_model
from tiny import LINEARS

import mezo
from mezo.adapter import assemble, initial_values, save_peft
from mezo_kernels import Direction, TensorSpec, sample

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
    config = mezo.MezoConfig(rank=4, alpha=6, target_modules=LINEARS, seed=1)
    directory = tiny_model_dir("qwen2")
    names = {n: tuple(p.shape) for n, p in lora_parameters(peft_model(directory, config)).items()}
    weights = {name: torch.randn(shape) for name, shape in names.items()}
    save_peft(weights, config, tmp_path / "new" / "adapter", base_model=directory)
    model = load_peft(directory, tmp_path / "new" / "adapter")
    loaded = lora_parameters(model)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert model.peft_config["default"].lora_alpha == 6
