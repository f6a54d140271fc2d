"""The self-test on the transformers transformers, and that it finds planted faults there."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import mezo
from mezo.core.rows import Scores
from mezo.core.state import AdapterState
from mezo.engines import lora_layers, selftest, transformers
from tests.support.planted import with_signs_swapped
from tests.support.tiny import LINEARS, load_model, random_batch

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=12)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_directions": 12},
        {"prefix": "activated", "invocation": (77, 8)},
        {"rank": 1, "alpha": 1e-3, "distribution": "rademacher"},
        {"rank": 64, "alpha": 1024},
        {"eps": 1e30, "lr": 1e300},
    ],
    ids=["exact", "many", "activated", "weak", "strong", "wild"],
)
def test_a_sound_engine_passes(model_dir, dtype, change):
    model = load_model(model_dir).to(dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with mezo.attach(model, dataclasses.replace(CONFIG, **change), selftest=False) as run:
        theta = run.weights()
        checks = selftest.quick(run)
        assert [c.detail for c in checks if not c.is_ok] == []
        assert len({c.name for c in checks}) == len(checks) == 7
        assert run.steps == 0
        now = run.weights()
        assert all(torch.equal(theta[name], now[name]) for name in theta)
    after = model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_steps_after_the_self_test_are_those_without_it(model_dir):
    results = []
    for is_tested in (False, None):
        rng = random.Random(0)
        with mezo.attach(load_model(model_dir), CONFIG, selftest=is_tested) as run:
            results.append([run.step(random_batch(rng)).losses for _ in range(3)])
            results[-1].append({n: w.tolist() for n, w in run.weights().items()})
    assert results[0] == results[1]


def test_a_model_of_few_tokens_and_short_rows_passes(model_dir):
    model = load_model(model_dir)
    model.resize_token_embeddings(2)
    model.config.max_position_embeddings = 4
    model.config.bos_token_id = model.config.eos_token_id = None
    mezo.attach(model, CONFIG).close()


def test_a_model_without_finite_losses_is_refused(model_dir):
    model = load_model(model_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the base model's sums must be finite, got \\[nan"):
        mezo.attach(model, CONFIG)


def not_applied(patch):
    patch.setattr(lora_layers.LoraLinear, "_delta", lambda layer, x, name: torch.zeros(()))


def swapped_signs(patch):
    def swapped(*args, slots, **others):
        return AdapterState(*args, slots=with_signs_swapped(slots), **others)

    patch.setattr(transformers, "AdapterState", swapped)


def theta_never_written(patch):
    patch.setattr(AdapterState, "_sync_theta", lambda state: None)


def signs_apart(patch):
    change_scores(patch, lambda slot, x, call: x + 1e-5 * (slot == "minus0"))


def pair_apart(patch):
    # Only in the batch of a step: the calls before are 1 + 2 + 1.
    change_scores(patch, lambda slot, x, call: x + 1e-5 * (call == 5 and slot == "minus0"))


def base_moves(patch):
    change_scores(patch, lambda slot, x, call: x + 0.01 * call * (slot == "base"))


def weights_move(patch):
    before = AdapterState.perturb

    def perturb(state, step, eps):
        before(state, step, eps)
        state.arena[-1] = 1e-45  # of lora_B: no loss shows it

    patch.setattr(AdapterState, "perturb", perturb)


def change_scores(patch, change):
    calls = []
    before = transformers.TransformersSession._score

    def score(session, rows, slots):
        calls.append(None)
        scores = before(session, rows, slots)
        sums = {
            slot: [change(slot, x, len(calls)) for x in values]
            for slot, values in scores.logprob_sums.items()
        }
        return Scores(sums, scores.tokens, scores.forwards)

    patch.setattr(transformers.TransformersSession, "_score", score)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (not_applied, "'adapter applied' failed: log-likelihoods under slot plus0"),
        (swapped_signs, "'right slots' failed: slot plus0 and theta's slot"),
        (theta_never_written, '"theta\'s slot" failed: theta must give the log-likelihoods'),
        (signs_apart, "'right slots' failed: slot minus0 and theta's slot"),
        (pair_apart, r"'L\(theta, theta\) = 0' failed: .* equal to the bit, got"),
        (base_moves, "'base model' failed: the base model must give"),
        (weights_move, "'weights unchanged' failed"),
    ],
)
def test_a_planted_fault_is_named_and_attach_undone(model_dir, fault, message):
    model = load_model(model_dir)
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises(RuntimeError, match=message):
            mezo.attach(model, CONFIG)
        mezo.attach(model, CONFIG, selftest=False).close()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    mezo.attach(model, CONFIG).close()


def test_a_digest_sees_every_bit_and_place():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = [torch.randn(5, 8, generator=generator).to(dtype) for _ in range(3)]
        first = selftest.digest(tensors)
        assert selftest.digest([t.clone() for t in tensors]) == first
        changed = [t.clone() for t in tensors]
        changed[1].view(torch.int16)[2, 3] ^= 1
        assert selftest.digest(changed) != first
        assert selftest.digest([tensors[0].flip(0), *tensors[1:]]) != first
        assert selftest.digest([tensors[1], tensors[0], tensors[2]]) != first
