"""PEFT's rules for modules, ranks and scalings, as the table reads them."""

from __future__ import annotations

import math

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from mezo.checkpoint.peft_fields import field_against, kind_of, rank_of, scaling_of

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "layers.1.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
]
PATTERNS = [
    {},
    {"q_proj": 2, "up_proj": 3},
    {"proj": 5},
    {r"model\.layers\.1\..*": 2, "q_proj": 3},
    {"layers.1.self_attn.q_proj": 7},
    {"^model.layers.0.self_attn.q_proj": 16},
    {".*q_proj|lm_head": 9},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_ranks_and_scalings_are_pefts(path, patterns):
    expected = patterns.get(get_pattern_key(patterns.keys(), path), 4)
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": patterns}
    assert rank_of(config, path) == expected
    assert scaling_of(config, path) == 6 / expected
    assert scaling_of({**config, "use_rslora": True}, path) == 6 / math.sqrt(expected)
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": patterns}
    assert scaling_of(config, path) == expected / 4
    assert rank_of(config, path) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "embed_tokens"]},
        {"target_modules": r".*\.1\..*"},
        {"target_modules": r"model.*proj", "exclude_modules": r".*up_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 10]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [0],
            "layers_pattern": ["experts"],
        },
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_which_modules_are_adapted_is_pefts(path, fields):
    expected = check_target_module_exists(LoraConfig(**fields), path)
    is_adapted = bool(expected) and type(expected).__name__ != "_ExcludedModule"
    assert (field_against(fields, path) is None) == is_adapted


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "lora_A and lora_B of"),
        ("base_model.model.lm_head.lora_B.weight", "lora_A and lora_B of a linear"),
        ("base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight", "lora_A and"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "anything else"),  # PEFT finds it nowhere
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", "lora_A and lora_B of an ex"),
        ("base_model.model.model.layers.0.mlp.shared_expert.up_proj.lora_A.weight", "lora_A and"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding_A"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "a saved copy"),
        ("base_model.model.lm_head.weight", "a saved copy"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.bias", "lora_B.bias"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "anything else"),
        ("base_model.model.model.layers.0.mlp.up_proj.vera_lambda_b", "anything else"),
    ],
)
def test_kinds_of_tensors(name, what):
    assert kind_of(name)[0].what.startswith(what)
