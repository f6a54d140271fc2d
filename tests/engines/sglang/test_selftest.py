"""The self-test in the real engine: what it finds, what it leaves, and that faults are found."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
import torch

import mezo
from mezo.core.messages import Fingerprint
from mezo.diagnostics import comparison
from mezo.engines import selftest
from tests.support import planted
from tests.support.independent import save_random_adapter
from tests.support.tiny import LINEARS, load_model, random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=1)
SLOTS = 10  # enough for a run that stays beside the ones under test


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine, tmp_path_factory):
    sizes = {"max_loras_per_batch": SLOTS, "max_total_tokens": 4096}
    engine = planted.start(start_engine, tmp_path_factory, model_dir, CONFIG, **sizes)
    smaller = dataclasses.replace(CONFIG, rank=3)
    other = save_random_adapter(model_dir, smaller, tmp_path_factory.mktemp("other"))
    assert engine.load_lora_adapter("other", other).success
    generate(engine, "other")  # brings it into the pool
    return engine


@pytest.fixture(scope="module")
def bystander(engine):
    """A run that stays; its session also carries the messages that plant faults."""
    with mezo.attach(engine, dataclasses.replace(CONFIG, name="bystander"), selftest=False) as run:
        yield run


@pytest.fixture
def plant(bystander):
    """A function that plants a fault into the scheduler process until the test ends."""

    def put(fault):
        bystander.session.call(planted.Plant(fault))

    yield put
    put(None)


def generate(engine, adapter):
    output = engine.generate(
        input_ids=[[1, 5, 9, 300]],
        lora_path=[adapter],
        sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    )[0]
    return output["output_ids"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_directions": 2},
        {"prefix": "activated", "invocation": (77, 8)},
        {"prefix": "detached"},
        {"rank": 1, "alpha": 1e-3, "target_modules": ("v_proj",)},
    ],
    ids=["exact", "two_directions", "activated", "detached", "weak"],
)
def test_a_sound_engine_passes_and_is_left_as_it_was(engine, bystander, change):
    config = dataclasses.replace(CONFIG, **change)
    engine.flush_cache()
    with mezo.attach(engine, config, selftest=False) as run:
        memory = run.session.free_memory()
        weights = run.weights()
        before = run.session.call(Fingerprint())
        started = time.perf_counter()
        checks = selftest.quick(run)
        seconds = time.perf_counter() - started
        after = run.session.call(Fingerprint())
        assert [c.name for c in checks if not c.is_ok] == []
        served = run.session.info.not_served is None  # 0.5.17 serves no activated ones
        assert len({c.name for c in checks}) == len(checks) == (11 if served else 10)
        assert seconds < 1
        assert run.steps == 0
        assert run.session.free_memory() == memory
        assert memory["evictable_tokens"] == memory["protected_tokens"] == 0
        now = run.weights()
        assert all(torch.equal(weights[name], now[name]) for name in weights)
        assert after.base == before.base
        own = {name for name in before.slots if name.startswith("mezo/")}
        assert {n for n in after.slots if after.slots[n] != before.slots[n]} <= own
        assert {"other", "bystander", "bystander/plus0", "mezo"} <= before.slots.keys() - own


def test_steps_after_the_self_test_are_those_without_it(engine):
    results = []
    for is_tested in (False, None):
        rng = random.Random(0)
        with mezo.attach(engine, CONFIG, selftest=is_tested) as run:
            steps = [run.step(random_batch(rng)) for _ in range(3)]
            results.append([(s.step, s.losses, s.coefficients, s.tokens) for s in steps])
            results[-1].append({n: w.tolist() for n, w in run.weights().items()})
    assert results[0] == results[1]


def test_a_trained_run_passes_too(engine):
    rng = random.Random(1)
    with mezo.attach(engine, CONFIG) as run:
        for _ in range(3):
            run.step(random_batch(rng), lr=1e-2)
        before = run.evaluate(random_batch(random.Random(2))).loss
        assert all(check.is_ok for check in selftest.quick(run))
        assert run.evaluate(random_batch(random.Random(2))).loss == before
        assert run.step(random_batch(rng)).step == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        # Which slot lies beside which is chance, and with it what is seen first.
        ("views_of_other_slots", "'(adapter applied|right slots|other adapters)' failed: "),
        ("signs_swapped", "'right slots' failed: slot plus0 and theta's slot hold the same"),
        ("adapter_not_applied", "'adapter applied' failed: log-likelihoods under slot plus0"),
        ("theta_never_written", "'theta's slot' failed: theta must give the log-likelihoods"),
        ("signs_scored_apart", "'right slots' failed: slot minus0 and theta's slot"),
        ("base_moves", "'base model' failed: the base model must give"),
        ("another_adapter_is_written", r"'other adapters' failed: .* other: -?\d+ before, -?\d+"),
        ("weights_are_perturbed_for_good", "'weights unchanged' failed: .* got"),
        ("version_not_in_the_key", "'no stale KV' failed: a request made after an update must .*"),
        ("waiting_requests_keep_their_key", "'no stale KV' failed: a request that waited while"),
        ("kv_enters_the_cache", "'memory and locks' failed: .* evictable_tokens: 0 before, 1"),
    ],
)
def test_a_planted_fault_is_named_and_attach_undone(engine, bystander, plant, fault, message):
    names = sorted(bystander.session.call(Fingerprint()).slots)
    plant(fault)
    with pytest.raises(RuntimeError) as caught:
        mezo.attach(engine, CONFIG)
    caught.match(message.replace("'theta's slot'", '"theta\'s slot"'))
    caught.match("pass selftest=False to go on all the same")
    plant(None)
    engine.flush_cache()
    assert sorted(bystander.session.call(Fingerprint()).slots) == names
    free = bystander.session.free_memory()
    assert free["evictable_tokens"] == free["protected_tokens"] == 0
    mezo.attach(engine, CONFIG).close()


def test_a_fault_goes_unseen_without_the_self_test(engine, plant):
    plant("version_not_in_the_key")
    mezo.attach(engine, CONFIG, selftest=False).close()


def test_a_trained_run_compares_too(engine):
    rng = random.Random(4)
    with mezo.attach(engine, CONFIG) as run:
        for _ in range(3):
            run.step(random_batch(rng), lr=1e-2)
        check = comparison.compare(run)
        assert check.is_ok, check.detail
        assert run.steps == 3


def test_llama_is_the_model_of_transformers(engine, model_dir, monkeypatch, caplog):
    monkeypatch.setitem(comparison.TOLERANCE, torch.float32, 1e-5)
    for change in ({}, {"prefix": "activated", "invocation": (77, 8)}, {"num_directions": 2}):
        with mezo.attach(engine, dataclasses.replace(CONFIG, **change), selftest=True) as run:
            check = comparison.compare(run)
            assert check.is_ok, check.detail
            assert not check.is_skipped
            assert "6 rows of " in check.detail
            assert run.steps == 0
    # SGLang 0.5.17 serves no activated adapters, which is said.
    said = [r for r in caplog.records if "requests cannot name run" not in r.getMessage()]
    assert not said
    engine.flush_cache()


def test_another_checkpoint_under_the_path_is_found(engine, model_dir, monkeypatch, caplog):
    other = load_model(model_dir)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: other)
    mezo.attach(engine, CONFIG, selftest=True).close()
    (record,) = caplog.records
    assert "the engine's model is not the reference's" in record.message


def test_what_does_not_fit_is_said(engine, monkeypatch, caplog):
    monkeypatch.setattr(comparison, "available_memory", lambda: 1000)
    mezo.attach(engine, CONFIG, selftest=True).close()
    (record,) = caplog.records
    assert "not compared with transformers: the checkpoint needs 0.0 GB" in record.message
