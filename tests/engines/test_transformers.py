"""The truth itself against independent computations: PEFT, Algorithm 1, autograd, replay."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

import mezo
from mezo_kernels import Direction, TensorSpec, sample
from tests.support.independent import (
    activated_pair,
    check_activated_step,
    check_against_algorithm_1,
    check_replay,
    load_peft,
    lora_parameters,
    peft_model,
    reference_loss,
)
from tests.support.tiny import LINEARS, load_model, random_batch

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=12)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model_dir(request, tiny_model_dir):
    return tiny_model_dir(request.param)


@pytest.fixture
def run(model_dir):
    with mezo.attach(load_model(model_dir), CONFIG) as run:
        yield run


@pytest.mark.parametrize("kind", ["completion", "classification"])
def test_algorithm_1_gives_the_same_losses_and_update(run, model_dir, kind):
    rng = random.Random(kind)
    batches = [random_batch(rng, kind=kind) for _ in range(10)]
    check_against_algorithm_1(run, model_dir, batches)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_activated_steps_equal_base_keys_and_values_with_peft(tiny_model_dir, architecture):
    model_dir = tiny_model_dir(architecture)
    config = dataclasses.replace(CONFIG, prefix="activated", invocation=(77, 8, 200))
    rng = random.Random(architecture)
    pair = activated_pair(model_dir, config)
    with mezo.attach(load_model(model_dir), config) as run:
        for kind in ("completion", "classification") * 2:
            check_activated_step(run, pair, random_batch(rng, kind=kind))


def test_replay_is_bitwise_whatever_is_read_in_between(run, tmp_path):
    rng = random.Random(1)
    results = []
    for number in range(20):
        batch = random_batch(rng)
        results.append(run.step(batch))
        if number % 5 == 2:  # reading flushes the deferred update; the bits must not notice
            run.evaluate(batch)
            run.save(tmp_path)
            run.pair_losses(batch)
    check_replay(results, run.weights(), CONFIG.seed)


def test_replay_by_a_second_run(run, model_dir):
    rng = random.Random(2)
    results = [run.step(random_batch(rng)) for _ in range(5)]
    batch = random_batch(rng)
    with mezo.attach(load_model(model_dir), CONFIG) as late:
        late.apply_update(results[0].coefficients)
        late.apply_updates([result.coefficients for result in results[1:]])  # in one pass
        assert late.steps == run.steps
        ours, theirs = late.weights(), run.weights()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert late.evaluate(batch).loss == run.evaluate(batch).loss
        assert late.step(batch).loss == run.step(batch).loss
        with pytest.raises(ValueError, match="one entry for each of the 1 directions, got 2"):
            late.apply_update([0.1, 0.2])


def test_eps_0_gives_bitwise_equal_losses(run):
    rng = random.Random(3)
    run.step(random_batch(rng))
    for kind in ("completion", "classification"):
        result = run.pair_losses(random_batch(rng, size=5, kind=kind), eps=0.0)
        assert result.loss_plus == result.loss_minus
        assert result.coefficients == ()


def test_saved_adapter_gives_the_same_logits_in_peft(run, model_dir, tmp_path):
    rng = random.Random(4)
    for _ in range(10):
        run.step(random_batch(rng), lr=1e-2)
    batch = random_batch(rng)
    ours = run.evaluate(batch).loss
    base = run.evaluate(batch, base=True).loss
    model = load_peft(model_dir, run.save(tmp_path))
    with torch.no_grad():
        assert ours == pytest.approx(reference_loss(model, batch).item(), abs=1e-5)
        plain = reference_loss(load_model(model_dir), batch).item()
    assert base == pytest.approx(plain, abs=1e-5)
    assert abs(ours - base) > 1e-2
    ids = torch.tensor([[1, *range(20, 40)]])
    theta = run.session.state.slot("theta")
    with torch.no_grad(), run.session._switched_to(theta.uid):
        live = run.session.model(ids).logits
    torch.testing.assert_close(live, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_mean_of_g_z_converges_to_the_gradient(model_dir):
    # 2 modules of rank 1: few enough parameters for the mean of some hundred directions.
    config = mezo.MeZOConfig(rank=1, alpha=2, target_modules=("v_proj",), eps=1e-3, seed=6)
    rng = random.Random(6)
    batch = random_batch(rng, size=2)
    with mezo.attach(load_model(model_dir), config) as run:
        run.apply_update([0.3])  # B = 0 would make A's gradient vanish
        theta = run.weights()
        model = peft_model(model_dir, config)
        parameters = lora_parameters(model)
        for name, parameter in parameters.items():
            parameter.data.copy_(theta[name])
        reference_loss(model, batch).backward()
        gradient = torch.cat([parameters[n].grad.reshape(-1).double() for n in theta])
        n, total, d = 400, torch.zeros_like(gradient), gradient.numel()
        slopes, exact = [], []
        for _ in range(n):
            g = run.pair_losses(batch).projected_grads[0]
            z = torch.cat(
                [
                    sample(
                        TensorSpec(name, tuple(value.shape)), Direction(config.seed, run.steps)
                    ).reshape(-1)
                    for name, value in theta.items()
                ]
            ).double()
            total += g * z / n
            slopes.append(g)
            exact.append((gradient @ z).item())
            run.apply_update([])  # the next step's directions, the same weights
    # Each two-point estimate is the directional derivative to fp32 noise and O(eps^2).
    scale = gradient.norm().item()
    errors = [abs(a - b) / scale for a, b in zip(slopes, exact, strict=True)]
    assert sorted(errors)[n // 2] < 5e-3
    # E |mean - gradient|^2 = |gradient|^2 (d + 1) / n; cosine^2 = n / (n + d + 1).
    assert ((total - gradient).norm() / scale).item() == pytest.approx(
        math.sqrt((d + 1) / n), rel=0.25
    )
    cosine = (total @ gradient / (total.norm() * gradient.norm())).item()
    assert cosine == pytest.approx(math.sqrt(n / (n + d + 1)), abs=0.08)


def test_closing_puts_the_model_back(model_dir):
    model = load_model(model_dir).train()
    names = [name for name, _ in model.named_modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = mezo.attach(model, CONFIG)
    assert not model.training
    run.step(random_batch(random.Random(5)))
    with pytest.raises(ValueError, match="q_proj must be a linear layer, got LoraLinear"):
        mezo.attach(model, CONFIG)
    run.close()
    assert model.training
    assert [name for name, _ in model.named_modules()] == names
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_attachments_raise(model_dir):
    model = load_model(model_dir)
    with pytest.raises(ValueError, match=r"got \['w_proj'\]; it has \['down_proj'"):
        mezo.attach(model, mezo.MeZOConfig(target_modules=("q_proj", "w_proj")))
    with pytest.raises(TypeError, match=r"got str; make one with mezo.launch_engine"):
        mezo.attach("a model", CONFIG)


def test_a_nonfinite_loss_skips_the_step(model_dir):
    config = mezo.MeZOConfig(rank=2, target_modules=LINEARS, eps=1e30)
    rng = random.Random(8)
    with mezo.attach(load_model(model_dir), config) as run:
        before = run.weights()
        result = run.step(random_batch(rng))
        assert result.status is mezo.StepStatus.NONFINITE_LOSS
        assert result.coefficients == ()
        after = run.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
        with pytest.raises(mezo.NonfiniteLossError, match=r"step 1: .* lower lr or change eps"):
            run.step(random_batch(rng), throw=True)


def test_an_update_beyond_fp32_skips_the_step(model_dir):
    config = mezo.MeZOConfig(rank=2, target_modules=LINEARS, lr=1e300)
    with mezo.attach(load_model(model_dir), config) as run:
        before = run.weights()
        result = run.step(random_batch(random.Random(10)))
        assert result.status is mezo.StepStatus.NONFINITE_LOSS
        assert math.isfinite(result.loss)
        with pytest.raises(ValueError, match=r"must be between .* got inf"):
            run.apply_update([float("inf")])
        after = run.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_clip_bounds_the_projected_grad(model_dir):
    batch = random_batch(random.Random(9))
    loose = mezo.MeZOConfig(rank=4, target_modules=LINEARS, lr=0.5)
    tight = mezo.MeZOConfig(rank=4, target_modules=LINEARS, lr=0.5, clip=1e-3)
    with mezo.attach(load_model(model_dir), loose) as run:
        free = run.step(batch).projected_grads[0]
    with mezo.attach(load_model(model_dir), tight) as run:
        result = run.step(batch)
    assert abs(free) > 1e-3
    assert result.projected_grads == (math.copysign(1e-3, free),)
    assert result.coefficients == (-0.5 * result.projected_grads[0],)
