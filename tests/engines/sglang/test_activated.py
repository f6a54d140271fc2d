"""prefix="activated": against base keys and values + PEFT; what is computed, shared, given back."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import mezo
from tests.support.independent import (
    activated_pair,
    check_activated_step,
    check_replay,
    load_peft,
    relative_distance,
)
from tests.support.tiny import LINEARS, VOCAB, load_model, random_batch, raw_request

pytestmark = pytest.mark.sglang

INVOCATION = (77, 8, 200)
CONFIG = mezo.MeZOConfig(
    rank=4,
    alpha=8,
    target_modules=LINEARS,
    lr=1e-3,
    eps=1e-2,
    seed=21,
    prefix="activated",
    invocation=INVOCATION,
)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_dir(request, tiny_model_dir):
    return tiny_model_dir(request.param)


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    return start_engine(model_dir, CONFIG, max_loras_per_batch=6, max_total_tokens=2048)


@pytest.fixture
def run(engine):
    engine.flush_cache()
    with mezo.attach(engine, CONFIG) as run:
        yield run


@pytest.fixture
def pair(model_dir):
    return activated_pair(model_dir, CONFIG)


@pytest.mark.parametrize("kind", ["completion", "classification"])
def test_steps_equal_base_keys_and_values_with_peft(run, pair, kind):
    rng = random.Random(kind)
    results = [check_activated_step(run, pair, random_batch(rng, kind=kind)) for _ in range(6)]
    check_replay(results, run.weights(), CONFIG.seed)


def test_twenty_steps_agree_with_transformers(run, model_dir):
    rng = random.Random(1)
    with mezo.attach(load_model(model_dir), CONFIG) as truth:
        for number in range(20):
            batch = random_batch(rng, kind=("completion", "classification")[number % 2])
            ours, theirs = run.step(batch), truth.step(batch)
            assert ours.loss_plus == pytest.approx(theirs.loss_plus, abs=1e-5)
            assert ours.loss_minus == pytest.approx(theirs.loss_minus, abs=1e-5)
        assert relative_distance(run.weights(), truth.weights()) < 1e-4


def test_a_prompt_is_computed_once_and_shared_by_all_rows(run):
    rng = random.Random(2)
    batch = random_batch(rng, kind="classification")
    prompts = sum(len(p) for p in batch.prompts)
    suffix, rows = 0, 0
    for prompt, options in zip(batch.prompts, batch.options, strict=True):
        # No option's last token is run, and what is then equal is one row.
        lengths = [len(INVOCATION) + len(o) for o in {tuple(o[:-1]) for o in options}]
        suffix += 2 * sum(lengths)
        rows += 2 * len(prompt) * len(lengths)
    first = run.step(batch)
    assert (first.prompt_tokens, first.tokens, first.forwards) == (prompts, prompts + suffix, 2)
    held = run.session.free_memory()
    distinct = {tuple(p[: k + 1]) for p in batch.prompts for k in range(len(p))}
    assert held["evictable_tokens"] == len(distinct)  # they share their first token
    for _ in range(3):  # the next epochs
        again = run.step(batch)
        assert (again.prompt_tokens, again.tokens, again.forwards) == (0, suffix, 1)
        assert again.reused_tokens == rows
        assert run.session.free_memory() == held


def test_prompts_that_begin_each_other_and_empty_ones(run, pair):
    rng = random.Random(3)
    long = [rng.randrange(3, VOCAB) for _ in range(40)]
    prompts = [long, long[:17], [], long[:17], [*long[:20], 9, 9]]
    batch = mezo.Batch(prompts=prompts, completions=[[5], [6, 7], [8, 9], [10], [11]])
    result = check_activated_step(run, pair, batch)
    # 40 and 17 are one run in the cache once both are there, the last differs behind 20 tokens.
    assert run.session.free_memory()["evictable_tokens"] == 42
    assert result.prompt_tokens == 40 + 17 + 22  # found missing together, computed together
    assert check_activated_step(run, pair, batch).prompt_tokens == 0


def test_eviction_other_requests_and_slot_writes_in_between(run, engine, pair):
    rng = random.Random(4)
    batch = random_batch(rng, size=3)
    check_activated_step(run, pair, batch)
    before = engine.generate(
        input_ids=[batch.prompts[0]], sampling_params={"temperature": 0, "max_new_tokens": 4}
    )[0]
    # The base model's request takes the prompt that training left in the cache.
    assert before["meta_info"]["cached_tokens"] == len(batch.prompts[0]) - 1
    assert check_activated_step(run, pair, batch).prompt_tokens == 0
    engine.flush_cache()
    result = check_activated_step(run, pair, batch)
    assert result.prompt_tokens == sum(len(p) for p in batch.prompts)
    # Longer prompts than the cache holds together: some are evicted, none is wrong.
    for number in range(6):
        prompt = [[rng.randrange(3, VOCAB) for _ in range(240)] for _ in range(2)]
        long = mezo.Batch(prompts=prompt, completions=[[5, 6], [7]])
        assert check_activated_step(run, pair, long).prompt_tokens == 480, number
    assert check_activated_step(run, pair, batch).prompt_tokens > 0
    engine.flush_cache()
    after = engine.generate(
        input_ids=[batch.prompts[0]], sampling_params={"temperature": 0, "max_new_tokens": 4}
    )[0]
    assert after["output_ids"] == before["output_ids"]


def test_a_batch_beyond_the_budget_is_cut(run, pair):
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(200)] for _ in range(16)]
    batch = mezo.Batch(prompts=prompts, completions=[[5, 6] for _ in prompts])
    result = check_activated_step(run, pair, batch)  # 3,200 prompt tokens, 2,048 in the pool
    assert result.forwards > 2
    assert result.prompt_tokens == 3200


def test_eps_0_is_bitwise(run):
    rng = random.Random(6)
    for _ in range(3):
        result = run.pair_losses(random_batch(rng, size=5, kind="classification"), eps=0.0)
        assert result.loss_plus == result.loss_minus


def test_locks_and_slots_balance_over_200_steps_and_a_failure(run, engine):
    rng = random.Random(7)
    batches = [random_batch(rng, kind=kind) for kind in ("completion", "classification") * 5]
    for batch in batches:
        run.step(batch)
    held = run.session.free_memory()
    assert held["protected_tokens"] == 0
    for number in range(200):
        run.step(batches[number % len(batches)])
    assert run.session.free_memory() == held
    for tokens in ([1, 5, 10**6, 7, 8], [1, 10**6, 5, 7, 8]):  # in the suffix, in the prompt
        request = raw_request(run.steps, tokens, prefix_len=2)
        with pytest.raises(RuntimeError, match="index out of range"):
            run.session.step(request)
        memory = run.session.free_memory()
        assert memory["protected_tokens"] == 0
        assert memory["request_slots"] == held["request_slots"]
        assert memory["kv_tokens"] + memory["evictable_tokens"] == 2048
    assert run.step(batches[0]).status is mezo.StepStatus.OK
    assert engine.flush_cache()


def test_two_directions_share_the_prompts(engine):
    engine.flush_cache()
    batch = random_batch(random.Random(8))
    config = dataclasses.replace(CONFIG, num_directions=2, name="two")
    with mezo.attach(engine, config) as run:
        result = run.step(batch)
        assert result.forwards == 2
        assert len(result.projected_grads) == 2
        assert result.prompt_tokens == sum(len(p) for p in batch.prompts)
        assert result.reused_tokens == 4 * result.prompt_tokens


def test_saved_adapter_is_an_activated_one_for_peft(run, model_dir, tmp_path):
    rng = random.Random(9)
    for _ in range(20):
        run.step(random_batch(rng), lr=1e-2)
    batch = random_batch(rng, size=3)
    model = load_peft(model_dir, run.save(tmp_path))
    assert model.peft_config["default"].alora_invocation_tokens == list(INVOCATION)
    losses = []
    for prompt, completion in batch.pairs():
        # PEFT itself finds the invocation in the tokens and leaves what is before it alone.
        row = [*prompt, *INVOCATION, *completion]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        positions = torch.arange(len(row) - len(completion) - 1, len(row) - 1)
        losses.append(logits[positions, torch.tensor(completion)])
    expected = -torch.cat(losses).mean().item()
    assert run.evaluate(batch).loss == pytest.approx(expected, abs=1e-5)
    assert run.evaluate(batch, base=True).loss != pytest.approx(expected, abs=1e-3)
