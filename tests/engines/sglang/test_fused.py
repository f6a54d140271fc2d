"""Checkpoints whose own layers are stacked (Phi-3): PEFT's names and numbers, or a refusal."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import mezo
from tests.support.independent import (
    check_against_algorithm_1,
    check_replay,
    load_peft,
    lora_parameters,
    row_logprobs,
)
from tests.support.tiny import random_batch

pytestmark = pytest.mark.sglang

FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=FUSED, lr=1e-3, eps=1e-2, seed=21)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("phi3")


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def engine(request, model_dir, start_engine):
    return start_engine(model_dir, CONFIG, max_loras_per_batch=5, tp_size=request.param)


def test_algorithm_1_on_peft_gives_the_same_losses_and_update(engine, model_dir):
    rng = random.Random(0)
    with mezo.attach(engine, CONFIG) as run:
        check_against_algorithm_1(run, model_dir, [random_batch(rng) for _ in range(3)])


def test_replay_is_bitwise(engine):
    rng = random.Random(1)
    with mezo.attach(engine, CONFIG) as run:
        results = [run.step(random_batch(rng)) for _ in range(5)]
        check_replay(results, run.weights(), CONFIG.seed)


def test_peft_and_sglang_find_every_tensor_of_the_saved_adapter(engine, model_dir, tmp_path):
    rng = random.Random(2)
    row = [1, 5, 9, 300, 44, 7, 100, 45]
    with mezo.attach(engine, CONFIG) as run:
        for _ in range(10):
            run.step(random_batch(rng), lr=3e-3)
        run.save(tmp_path)
        weights = run.weights()
    model = load_peft(model_dir, tmp_path)
    loaded = lora_parameters(model)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert engine.load_lora_adapter("saved", str(tmp_path)).success
    output = engine.generate(
        input_ids=[row],
        lora_path=["saved"],
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
    )[0]
    engine.unload_lora_adapter("saved")
    served = torch.tensor([t[0] for t in output["meta_info"]["input_token_logprobs"]][1:])
    with torch.no_grad():
        expected = row_logprobs(model, row, 1)
    torch.testing.assert_close(served, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "v_proj"), r"got \['q_proj', 'v_proj'\], .* use \['qkv_proj'\] in their"),
        (("o_proj", "gate_proj"), r"got \['gate_proj'\], .* use \['gate_up_proj'\] in their"),
        (("qkv_proj", "k_proj"), "must name 'qkv_proj' or its pieces, got both"),
    ],
)
def test_names_that_the_checkpoint_lacks_are_refused(engine, targets, message):
    with pytest.raises(ValueError, match=message):
        mezo.attach(engine, dataclasses.replace(CONFIG, target_modules=targets))
    mezo.attach(engine, CONFIG).close()  # nothing was left behind


def test_part_of_the_fused_layers(engine, model_dir):
    config = dataclasses.replace(CONFIG, target_modules=("qkv_proj",), rank=3)
    rng = random.Random(3)
    with mezo.attach(engine, config) as run:
        check_against_algorithm_1(run, model_dir, [random_batch(rng) for _ in range(2)])
