"""Training beside serving: what a step touches, what requests see, leaks, bad input."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

import mezo
from mezo.core.messages import Fingerprint
from tests.support.independent import (
    load_peft,
    row_logprobs,
    save_random_adapter,
)
from tests.support.tiny import LINEARS, load_model, random_batch, raw_request

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=1)
PROMPTS = [[1, 5, 9, 300, 44, 7, 100, 45], [1, 17, 8, 450, 3]]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def other_adapter(model_dir, tmp_path_factory):
    """A PEFT adapter that somebody else serves."""
    smaller = dataclasses.replace(CONFIG, rank=3)
    return save_random_adapter(model_dir, smaller, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def engine(model_dir, other_adapter, start_engine):
    engine = start_engine(model_dir, CONFIG, max_loras_per_batch=5, max_total_tokens=4096)
    assert engine.load_lora_adapter("other", other_adapter).success
    return engine


def generate(engine, prompts, adapters):
    """Greedy tokens and their log-likelihoods, with the tokens taken from the cache."""
    outputs = engine.generate(
        input_ids=prompts,
        lora_path=adapters,
        sampling_params={"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        return_logprob=True,
    )
    return [
        (o["output_ids"], [t[0] for t in o["meta_info"]["output_token_logprobs"]]) for o in outputs
    ], [o["meta_info"]["cached_tokens"] for o in outputs]


def test_a_step_touches_nothing_but_its_own_slots(engine):
    rng = random.Random(0)
    adapters = ["other", None]
    with mezo.attach(engine, CONFIG) as run:
        generate(engine, PROMPTS, adapters)
        before = run.session.call(Fingerprint())
        for _ in range(3):
            run.step(random_batch(rng))
        after = run.session.call(Fingerprint())
    assert after.base == before.base
    changed = {name for name in before.slots if before.slots[name] != after.slots[name]}
    assert changed == {"mezo/plus0", "mezo/minus0"}  # theta's slot is written on demand
    assert {"other", "None"} <= before.slots.keys()


def test_other_generations_are_identical_before_during_and_after(engine):
    rng = random.Random(1)
    adapters = ["other", None]
    engine.flush_cache()
    before, cached = generate(engine, PROMPTS, adapters)
    assert cached == [0, 0]
    with mezo.attach(engine, CONFIG) as run:
        for _ in range(4):
            run.step(random_batch(rng))
            engine.flush_cache()
            during, cached = generate(engine, PROMPTS, adapters)
            assert during == before
            assert cached == [0, 0]  # training leaves nothing in the cache
    engine.flush_cache()
    after, _ = generate(engine, PROMPTS, adapters)
    assert after == before


def test_requests_see_the_weights_of_the_last_step(engine, model_dir, tmp_path):
    rng = random.Random(2)
    engine.flush_cache()
    seen = []
    with mezo.attach(engine, CONFIG) as run:
        for number in range(3):
            for _ in range(10):
                run.step(random_batch(rng), lr=3e-3)
            # No flush: the radix cache holds this prompt's KV of older weights.
            (served, repeated), cached = generate(engine, [PROMPTS[0]] * 2, [run.name] * 2)
            assert served[0] == repeated[0]
            assert cached[0] == 0
            adapter = run.save(tmp_path / str(number))
            tokens = served[0]
            with torch.no_grad():
                expected = row_logprobs(
                    load_peft(model_dir, adapter), [*PROMPTS[0], *tokens], len(PROMPTS[0])
                )
            torch.testing.assert_close(torch.tensor(served[1]), expected, atol=1e-5, rtol=0)
            # Unchanged weights may use the cache, and give the same answer.
            (again,), cached = generate(engine, [PROMPTS[0]], [run.name])
            assert again[0] == tokens
            assert cached[0] > 0
            seen.append(served[1])
    assert seen[0] != seen[1] != seen[2]


def test_no_slot_leaks_over_100_steps_nor_when_a_forward_fails(engine):
    rng = random.Random(3)
    engine.flush_cache()
    with mezo.attach(engine, CONFIG) as run:
        free = run.session.free_memory()
        assert free["protected_tokens"] == free["evictable_tokens"] == 0
        for number in range(100):
            run.step(random_batch(rng, kind=("completion", "classification")[number % 2]))
        assert run.session.free_memory() == free  # and nothing has entered the radix cache
        # Token ids are checked before they are sent; sent all the same, they break the forward.
        request = raw_request(run.steps, [1, 10**6, 5])
        with pytest.raises(RuntimeError, match="index out of range"):
            run.session.step(request)
        assert run.session.free_memory() == free
        assert run.step(random_batch(rng)).status is mezo.StepStatus.OK


def test_a_batch_beyond_the_budget_is_cut_and_gives_the_same_loss(engine, model_dir):
    rng = random.Random(4)
    # 100 sequences of 2 rows: more rows than the engine's 128 request slots.
    batch = random_batch(rng, size=100)
    with (
        mezo.attach(engine, CONFIG) as run,
        mezo.attach(load_model(model_dir), CONFIG) as truth,
    ):
        ours, theirs = run.step(batch), truth.step(batch)
        assert ours.forwards == 2
        assert ours.loss_plus == pytest.approx(theirs.loss_plus, abs=1e-5)
        assert ours.loss_minus == pytest.approx(theirs.loss_minus, abs=1e-5)
        # Prompts that options share take request slots of their own beside the rows.
        batch = random_batch(rng, size=40, kind="classification")
        ours, theirs = run.step(batch), truth.step(batch)
        assert ours.forwards > 2
        assert ours.loss_plus == pytest.approx(theirs.loss_plus, abs=1e-5)
        assert ours.loss_minus == pytest.approx(theirs.loss_minus, abs=1e-5)


def test_a_nonfinite_loss_skips_the_step(engine):
    rng = random.Random(5)
    with mezo.attach(engine, CONFIG) as run:
        run.step(random_batch(rng))
        before = run.weights()
        wild = raw_request(run.steps, [1, 2, 3], eps=1e30)
        reply = run.session.step(wild)
        assert not reply.is_finite
        assert reply.coefficients == ()
        after = run.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_configs_raise_at_attach(engine):
    for change, message in (
        ({"num_directions": 2}, "max_loras_per_batch must be at least 6 .* got 5"),
        ({"rank": 5}, "rank must be at most the engine's max_lora_rank 4, got 5"),
        ({"target_modules": ("q_proj", "w_proj")}, r"got \['w_proj'\] but the pool has"),
        ({"name": "other"}, "name must be new in the engine, got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            mezo.attach(engine, dataclasses.replace(CONFIG, **change))
    with mezo.attach(engine, CONFIG):
        with pytest.raises(ValueError, match="name must be new in the engine, got 'mezo'"):
            mezo.attach(engine, CONFIG)
        with pytest.raises(ValueError, match=r"must have 3 slots to pin .* got 1 .*=7"):
            mezo.attach(engine, dataclasses.replace(CONFIG, name="second"))
    mezo.attach(engine, CONFIG).close()  # what failed has left nothing behind


def test_bad_batches_raise_before_anything_is_sent(engine):
    long = [3] * 300
    with mezo.attach(engine, CONFIG) as run:
        for batch, message in (
            ({"prompts": [long], "completions": [[4]]}, "at most 256 tokens .* got 301"),
            ({"prompts": [[1]], "completions": [[]]}, "at least one completion token, got none"),
            ({"prompts": [[]], "completions": [[4]]}, "at least one prompt token"),
            ({"prompts": [[1]], "completions": [[600]]}, "vocabulary of 512, got 1..600"),
        ):
            with pytest.raises(ValueError, match=message):
                run.step(mezo.Batch(**batch))
        assert run.steps == 0


def test_a_closed_run_and_a_second_close(engine):
    run = mezo.attach(engine, CONFIG)
    run.close()
    run.close()
    with pytest.raises(RuntimeError, match="must be open, got a closed one"):
        run.step(mezo.Batch(prompts=[[1]], completions=[[4]]))
    with pytest.raises(ValueError, match="run 'mezo' must be attached"):
        run.session.weights()


def test_a_missing_plugin_is_named(engine, monkeypatch):
    from mezo.engines.sglang import conversation

    # An engine without our plugin answers every message as it answers one it does not know.
    monkeypatch.setattr(conversation, "METHOD", "not_a_method")
    with pytest.raises(RuntimeError, match=r"mezo plugin must be loaded .* SGLANG_PLUGINS"):
        mezo.attach(engine, CONFIG)


def test_an_engine_in_an_unsupported_mode_raises(engine):
    from types import SimpleNamespace

    from mezo.engines.sglang.sizing import check_server

    good = {"enable_lora": True, "max_loras_per_batch": 4, "pp_size": 1, "dp_size": 1}
    check_server("attach", SimpleNamespace(**good), CONFIG)
    for change, error, message in (
        ({"enable_lora": False}, ValueError, "enable_lora=True"),
        ({"max_loras_per_batch": 3}, ValueError, "at least 4 .* got 3"),
        ({"pp_size": 2}, NotImplementedError, "pp_size must be 1, got 2"),
        ({"dp_size": 2}, NotImplementedError, "dp_size must be 1, got 2"),
        ({"speculative_algorithm": "EAGLE"}, NotImplementedError, "must be None, got 'EAGLE'"),
    ):
        with pytest.raises(error, match=message):
            check_server("attach", SimpleNamespace(**{**good, **change}), CONFIG)


def test_text_batches_use_the_engines_tokenizer(engine):
    with mezo.attach(engine, CONFIG) as run:
        text = mezo.Batch(prompts=["w5 w9 w30"], completions=[" w44 w7"])
        ids = mezo.Batch(prompts=[[5, 9, 30]], completions=[[44, 7]])
        assert run.encode(text) == run.encode(ids)
        assert run.pair_losses(text).loss_plus == run.pair_losses(ids).loss_plus


def test_adapter_files_are_peft_files(engine, tmp_path):
    with mezo.attach(engine, CONFIG) as run:
        run.save(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == 4
    assert saved["lora_alpha"] == 8
    assert sorted(saved["target_modules"]) == sorted(LINEARS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
