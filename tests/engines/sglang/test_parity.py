"""SGLang against transformers and PEFT: losses, projected gradients, masters, saved adapters."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
import torch

import mezo
from tests.support.independent import (
    check_against_algorithm_1,
    check_projected_grad,
    check_replay,
    load_peft,
    relative_distance,
    row_logprobs,
    step_both,
)
from tests.support.tiny import LINEARS, load_model, random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=2**40 + 7)
SUBSET = mezo.MeZOConfig(rank=3, alpha=8, target_modules=("v_proj", "up_proj"), seed=5, name="vu")


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model_dir(request, tiny_model_dir):
    return tiny_model_dir(request.param)


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    return start_engine(model_dir, CONFIG, max_loras_per_batch=6)


@pytest.mark.parametrize("kind", ["completion", "classification"])
def test_twenty_steps_agree_with_transformers(engine, model_dir, kind):
    rng = random.Random(kind)
    batches = [random_batch(rng, kind=kind) for _ in range(20)]
    with (
        mezo.attach(engine, CONFIG) as run,
        mezo.attach(load_model(model_dir), CONFIG) as truth,
    ):
        for batch in batches:
            ours, theirs = step_both(run, truth, batch)
            tokens, is_shared = tokens_to_run(batch)
            assert ours.tokens == 2 * tokens
            assert ours.forwards == 1 + is_shared  # both signs in one batch
            check_projected_grad(ours.projected_grads[0], theirs.projected_grads[0])
        assert relative_distance(run.weights(), truth.weights()) < 1e-4
        assert ours.loss_plus != ours.loss_minus


def test_algorithm_1_gives_the_same_losses_and_update(engine, model_dir):
    rng = random.Random(3)
    with mezo.attach(engine, CONFIG) as run:
        check_against_algorithm_1(run, model_dir, [random_batch(rng) for _ in range(5)])


def test_replay_of_the_coefficients_is_bitwise(engine):
    rng = random.Random(11)
    with mezo.attach(engine, CONFIG) as run:
        results = [run.step(random_batch(rng)) for _ in range(20)]
        check_replay(results, run.weights(), CONFIG.seed)


def test_eps_0_gives_bitwise_equal_losses(engine):
    rng = random.Random(5)
    with mezo.attach(engine, CONFIG) as run:
        run.step(random_batch(rng))
        for size in (1, 2, 7, 16):
            result = run.pair_losses(random_batch(rng, size=size), eps=0.0)
            assert result.loss_plus == result.loss_minus
            assert result.projected_grads == ()


def test_saved_adapter_scores_the_same_in_peft_and_sglang(engine, model_dir, tmp_path):
    rng = random.Random(17)
    batch = random_batch(rng, size=3)
    with mezo.attach(engine, CONFIG) as run:
        for _ in range(20):
            run.step(random_batch(rng), lr=3e-3)  # far enough from theta_0 to tell them apart
        run.save(tmp_path)
        live = run.evaluate(batch)
        rows = [[*p, *c] for p, c in batch.pairs()]
        served = [_prompt_logprobs(engine, row, run.name) for row in rows]
    assert engine.load_lora_adapter("saved", str(tmp_path)).success
    reloaded = [_prompt_logprobs(engine, row, "saved") for row in rows]
    engine.unload_lora_adapter("saved")
    model = load_peft(model_dir, tmp_path)
    base = load_model(model_dir)
    with torch.no_grad():
        expected = [row_logprobs(model, row, 1) for row in rows]
        unadapted = [row_logprobs(base, row, 1) for row in rows]
    for ours, again, theirs, plain in zip(served, reloaded, expected, unadapted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(again, theirs, atol=1e-5, rtol=0)
        assert (plain - theirs).abs().max() > 1e-2
    scored = torch.cat([e[len(p) - 1 :] for e, (p, _) in zip(expected, batch.pairs(), strict=True)])
    assert live.loss == pytest.approx(-scored.mean().item(), abs=1e-5)


def test_two_directions_are_averaged(engine, model_dir):
    config = dataclasses.replace(CONFIG, num_directions=2, name="two")
    rng = random.Random(29)
    with (
        mezo.attach(engine, config) as run,
        mezo.attach(load_model(model_dir), config) as truth,
    ):
        for _ in range(3):
            batch = random_batch(rng)
            ours, theirs = run.step(batch), truth.step(batch)
            assert ours.forwards == 1
            assert len(ours.projected_grads) == 2
            assert ours.losses[0] != ours.losses[1]
            for mine, other in zip(ours.losses, theirs.losses, strict=True):
                assert mine == pytest.approx(other, abs=1e-5)
        assert relative_distance(run.weights(), truth.weights()) < 1e-4
        for coefficient, grad in zip(ours.coefficients, ours.projected_grads, strict=True):
            assert coefficient == -config.lr * grad / 2


def test_part_of_a_stacked_module_and_a_rank_below_the_pools(engine, model_dir):
    rng = random.Random(23)
    with (
        mezo.attach(engine, SUBSET) as run,
        mezo.attach(load_model(model_dir), SUBSET) as truth,
    ):
        for _ in range(5):
            batch = random_batch(rng, kind="classification")
            assert run.step(batch, lr=1e-2).loss_plus == pytest.approx(
                truth.step(batch, lr=1e-2).loss_plus, abs=1e-5
            )
        assert relative_distance(run.weights(), truth.weights()) < 1e-4


def tokens_to_run(batch) -> tuple[int, bool]:
    """Tokens of one sign, and whether prompts are run first.

    No completion's last token is run, and what is then equal is run once. A prompt that several
    begin with is run once without its last token, which each of them runs again.
    """
    distinct = {(tuple(p), tuple(c[:-1])) for p, c in batch.pairs()}
    count = Counter(p for p, _ in distinct)
    common = {p for p, n in count.items() if n > 1 and len(p) > 1}
    tokens = sum(map(len, {p[:-1] for p in common}))
    tokens += sum((1 if p in common else len(p)) + len(c) for p, c in distinct)
    return tokens, bool(common)


def _prompt_logprobs(engine, row, adapter) -> torch.Tensor:
    output = engine.generate(
        input_ids=[row],
        lora_path=[adapter],
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
    )[0]
    return torch.tensor([t[0] for t in output["meta_info"]["input_token_logprobs"]][1:])
