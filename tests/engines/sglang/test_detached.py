"""prefix="detached": prompts once under theta; its losses, its bias, what is given back."""

from __future__ import annotations

import random

import pytest
import torch

import mezo
from mezo_kernels import Direction
from tests.support.independent import (
    activated_loss,
    check_projected_grad,
    peft_model,
    perturbed,
    set_lora,
)
from tests.support.tiny import LINEARS, VOCAB, load_model, random_batch

pytestmark = pytest.mark.sglang

INVOCATION = (77, 8, 200)
CONFIG = mezo.MeZOConfig(
    rank=4,
    alpha=8,
    target_modules=LINEARS,
    lr=1e-3,
    eps=1e-2,
    seed=5,
    prefix="detached",
    invocation=INVOCATION,
)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model_dir(request, tiny_model_dir):
    return tiny_model_dir(request.param)


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    return start_engine(model_dir, CONFIG, max_total_tokens=2048)


@pytest.fixture
def run(engine):
    engine.flush_cache()
    with mezo.attach(engine, CONFIG) as run:
        yield run


@pytest.mark.parametrize("kind", ["completion", "classification"])
def test_steps_equal_theta_keys_and_values_with_peft(run, model_dir, kind):
    rng = random.Random(kind)
    at_theta, adapted = peft_model(model_dir, CONFIG), peft_model(model_dir, CONFIG)
    for number in range(6):
        batch = random_batch(rng, kind=kind)
        weights = run.weights()
        result = run.step(batch)
        set_lora(at_theta, weights)
        losses = []
        for scale in (CONFIG.eps, -CONFIG.eps):
            set_lora(adapted, perturbed(weights, Direction(CONFIG.seed, number), scale))
            losses.append(activated_loss(at_theta, adapted, batch, INVOCATION))
        assert result.loss_plus == pytest.approx(losses[0], abs=1e-5)
        assert result.loss_minus == pytest.approx(losses[1], abs=1e-5)
        grad = (losses[0] - losses[1]) / (2 * CONFIG.eps)
        check_projected_grad(result.projected_grads[0], grad)
        prompts = {tuple(p) for p in batch.prompts}
        assert result.prompt_tokens == sum(map(len, prompts))  # once, for both signs
        assert result.forwards == 2


def test_it_says_that_it_is_approximate(engine, caplog):
    with mezo.attach(engine, CONFIG):
        assert "is an approximation, it drops the prompt's part" in caplog.text


def test_nothing_is_kept_or_lost(run):
    rng = random.Random(1)
    free = run.session.free_memory()
    for number in range(50):
        run.step(random_batch(rng, kind=("completion", "classification")[number % 2]))
    assert run.session.free_memory() == free
    assert free["evictable_tokens"] == 0  # no KV of an adapter enters the cache


def test_without_an_invocation_the_last_prompt_token_is_the_rows_own(engine, model_dir):
    config = mezo.MeZOConfig(rank=4, target_modules=LINEARS, eps=1e-2, prefix="detached")
    rng = random.Random(2)
    with (
        mezo.attach(engine, config) as run,
        mezo.attach(load_model(model_dir), config) as truth,
    ):
        for _ in range(5):
            batch = random_batch(rng)
            ours, theirs = run.step(batch), truth.step(batch)
            assert ours.loss_plus == pytest.approx(theirs.loss_plus, abs=1e-5)
            assert ours.loss_minus == pytest.approx(theirs.loss_minus, abs=1e-5)


def test_prefix_bias_compares_with_exact_gradients_on_the_same_directions(engine, model_dir):
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(12)] for _ in range(4)]
    batches = [mezo.Batch(prompts=prompts, completions=[[5, 6]] * 4) for _ in range(8)]
    results = []
    for host in (engine, load_model(model_dir)):
        with mezo.attach(host, CONFIG) as run:
            run.apply_update([0.1])  # away from B = 0
            before = run.weights()
            results.append(mezo.prefix_bias(run, batches))
            after = run.weights()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert run.steps == 1
    ours, theirs = results
    assert len(ours.exact) == 8
    for a, b in zip(ours.exact + ours.detached, theirs.exact + theirs.detached, strict=True):
        check_projected_grad(a, b)
    assert ours.relative_error > 0.1  # the prompt's part of the derivative is missing
    assert abs(ours.correlation - theirs.correlation) < 1e-2
    with (
        mezo.attach(engine, mezo.MeZOConfig(rank=4, target_modules=LINEARS)) as run,
        pytest.raises(ValueError, match="run must have prefix 'detached', got 'exact'"),
    ):
        mezo.prefix_bias(run, batches)
