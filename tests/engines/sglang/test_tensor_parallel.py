"""Tensor parallel 2 on the CPU (two processes, gloo): losses, shards, replicated parts."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import mezo
from tests.support.independent import (
    activated_pair,
    check_activated_step,
    relative_distance,
    step_both,
)
from tests.support.tiny import LINEARS, VOCAB, load_model, random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=9)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_dir(request, tiny_model_dir):
    return tiny_model_dir(request.param)


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    return start_engine(model_dir, CONFIG, tp_size=2, random_seed=0)


def test_losses_agree_with_one_rank(engine, model_dir):
    rng = random.Random(0)
    with (
        mezo.attach(engine, CONFIG) as run,
        mezo.attach(load_model(model_dir), CONFIG) as truth,
    ):
        free = run.session.free_memory()
        for number in range(20):
            batch = random_batch(rng, kind=("completion", "classification")[number % 2])
            step_both(run, truth, batch)
        assert run.session.free_memory() == free
        # weights() raises when two ranks differ by a bit in a part that both hold.
        assert relative_distance(run.weights(), truth.weights()) < 1e-4


def test_shards_are_slices_of_the_one_rank_master(engine, model_dir):
    rng = random.Random(1)
    coefficients = [rng.gauss(0, 1e-3) for _ in range(20)]
    with (
        mezo.attach(engine, CONFIG) as run,
        mezo.attach(load_model(model_dir), CONFIG) as truth,
    ):
        run.apply_updates([[coefficient] for coefficient in coefficients])  # as one that goes on
        for coefficient in coefficients:
            truth.apply_update([coefficient])
        whole = truth.weights()
        shards = run.session.shards()
    assert [len(rank) for rank in shards] == [len(whole)] * 2
    cut = 0
    for spec, values in (shard for rank in shards for shard in rank):
        rows = slice(spec.row0, spec.row0 + spec.shape[0])
        cols = slice(spec.col0, spec.col0 + spec.shape[1])
        expected = whole[spec.name][rows, cols]
        assert torch.equal(values.view(torch.int32), expected.contiguous().view(torch.int32))
        cut += spec.shape != tuple(whole[spec.name].shape)
    # Per layer: lora_B of q, k, v, gate, up and lora_A of o, down are cut; the others replicated.
    assert cut == 2 * 2 * 7


def test_activated_steps_equal_base_keys_and_values_with_peft(engine, model_dir):
    config = dataclasses.replace(CONFIG, prefix="activated", invocation=(77, 8), name="activated")
    rng = random.Random(3)
    pair = activated_pair(model_dir, config)
    engine.flush_cache()
    batches = [random_batch(rng, kind=k) for k in ("completion", "classification")]
    # Options of one token each are read off their rows of lm_head, which the ranks share out.
    options = [[3], [VOCAB // 2 + 9], [VOCAB - 1]]
    batches.append(mezo.Batch(prompts=batches[0].prompts, options=options, labels=[0, 1, 2, 1]))
    with mezo.attach(engine, config) as run:
        for number in range(9):
            result = check_activated_step(run, pair, batches[number % 3])
            assert (result.prompt_tokens == 0) == (number >= 2)  # the prompts stay in the cache
        run.weights()  # raises when two ranks differ by a bit in a part that both hold
        assert run.session.free_memory()["protected_tokens"] == 0


def test_served_weights_are_those_of_training(engine, model_dir):
    rng = random.Random(2)
    row = [1, 5, 9, 300, 44]
    with mezo.attach(engine, CONFIG) as run:
        for _ in range(5):
            run.step(random_batch(rng), lr=1e-2)
        batch = mezo.Batch(prompts=[row[:1]], completions=[row[1:]])
        output = engine.generate(
            input_ids=[row],
            lora_path=[run.name],
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )[0]
        served = [t[0] for t in output["meta_info"]["input_token_logprobs"]][1:]
        assert run.evaluate(batch).loss == pytest.approx(-sum(served) / 4, abs=1e-5)
        assert run.evaluate(batch, base=True).loss != pytest.approx(-sum(served) / 4, abs=1e-3)
