"""Names and shapes of a checkpoint's linear layers, against the loaded model and PEFT."""

from __future__ import annotations

import random

import pytest
import torch
import transformers

import mezo
from mezo.engines.linears import ModelLinears, check_names, linears_of
from tests.support.independent import (
    check_against_algorithm_1,
    check_replay,
    load_peft,
    lora_parameters,
)
from tests.support.tiny import LINEARS, load_model, random_batch

FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def config_of(directory):
    return transformers.AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("architecture", ["llama", "opt", "phi3", "mistral"])
def test_the_meta_model_has_the_layers_of_the_loaded_one(tiny_model_dir, architecture):
    directory = tiny_model_dir(architecture)
    linears = linears_of(config_of(directory))
    model = load_model(directory)
    assert linears.shapes == {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linears.num_parameters == sum(p.numel() for p in model.parameters())
    assert linears.model_class == type(model).__name__


def test_transposed_layers_count_as_peft_counts_them():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=8, architectures=["GPT2LMHeadModel"]
    )
    linears = linears_of(config)
    assert linears.shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert linears.shapes["transformer.h.0.mlp.c_proj"] == (16, 64)


def test_models_that_transformers_does_not_know_say_so():
    config = transformers.LlamaConfig(architectures=["OwnForCausalLM"])
    assert linears_of(config) == "transformers has no class OwnForCausalLM for LlamaConfig"
    config = transformers.LlamaConfig(architectures=["Phi3ForCausalLM"])
    assert linears_of(config) == "transformers has no class Phi3ForCausalLM for LlamaConfig"
    config = transformers.LlamaConfig(
        hidden_act="no such", num_hidden_layers=1, architectures=["LlamaForCausalLM"]
    )
    assert linears_of(config).startswith("transformers could not build LlamaForCausalLM (KeyError")


def test_what_peft_would_not_find_is_refused():
    layer = "model.layers.0.self_attn"
    shapes = {f"{layer}.qkv_proj": (24, 8), f"{layer}.o_proj": (8, 8), "vision.o_proj": (4, 4)}
    linears = ModelLinears("AForCausalLM", shapes, 0)
    check_names(
        [(f"{layer}.qkv_proj.lora_A", (2, 8)), (f"{layer}.qkv_proj.lora_B", (24, 2))], linears, 2
    )
    for name, shape, message in (
        (
            f"{layer}.q_proj.lora_A",
            (2, 8),
            r"got \['q_proj'\], where the layers beside .* are "
            r"called \['o_proj', 'qkv_proj'\]; use \['qkv_proj'\] in their place, or attach",
        ),
        (f"{layer}.w_proj.lora_A", (2, 8), r"got \['w_proj'\], .*; use other ones, or attach"),
        (
            f"language_{layer}.o_proj.lora_A",
            (2, 8),
            "lie elsewhere there "
            rf"\('{layer}.o_proj' for 'language_{layer}.o_proj'\); use other ones",
        ),
        (
            f"{layer}.o_proj.lora_A",
            (2, 16),
            r"o_proj.lora_A must have the shape \(2, 8\) of "
            r"AForCausalLM's layer of that name, got \(2, 16\)",
        ),
        (f"{layer}.o_proj.lora_B", (16, 2), r"o_proj.lora_B must have the shape \(8, 2\)"),
        (f"{layer}.o_proj.lora_A", (3, 8), r"must have the shape \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_names([(name, shape)], linears, 2)
    split = {f"{layer}.q_proj": (8, 8), f"{layer}.k_proj": (8, 8), f"{layer}.v_proj": (8, 8)}
    with pytest.raises(ValueError, match=r"use \['q_proj', 'k_proj', 'v_proj'\] in their place"):
        check_names([(f"{layer}.qkv_proj.lora_A", (2, 8))], ModelLinears("L", split, 0), 2)


def test_the_transformers_engine_trains_fused_layers_under_pefts_names(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("phi3")
    config = mezo.MeZOConfig(rank=4, alpha=8, target_modules=FUSED, lr=1e-3, seed=21)
    rng = random.Random(0)
    with mezo.attach(load_model(model_dir), config) as run:
        check_against_algorithm_1(run, model_dir, [random_batch(rng) for _ in range(3)])
    with mezo.attach(load_model(model_dir), config) as run:
        results = [run.step(random_batch(rng)) for _ in range(5)]
        weights = run.weights()
        check_replay(results, weights, config.seed)
        loaded = lora_parameters(load_peft(model_dir, run.save(tmp_path)))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_layers_that_the_transformers_engine_cannot_train_are_named(tiny_model_dir):
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8)
    )
    with pytest.raises(ValueError, match=r"c_attn must be a torch.nn.Linear, got Conv1D \(GPT-2's"):
        mezo.attach(gpt2, mezo.MeZOConfig(target_modules=("c_attn",)))
    with pytest.raises(ValueError, match=r"got \['gate_proj', 'k_proj', .*\]; it has \['down_proj"):
        mezo.attach(load_model(tiny_model_dir("phi3")), mezo.MeZOConfig(target_modules=LINEARS))
