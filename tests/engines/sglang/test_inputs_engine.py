"""One real engine: many directions, inputs of every kind, a tokenizer of the caller's own."""

from __future__ import annotations

import logging
import random

import numpy as np
import psutil
import pytest
import torch

import mezo
from mezo_kernels import Direction
from tests.support.independent import peft_model, perturbed, reference_loss, set_lora
from tests.support.tiny import LINEARS, make_tokenizer, random_batch

pytestmark = pytest.mark.sglang

MANY = mezo.MeZOConfig(rank=2, alpha=4, target_modules=LINEARS, seed=3, lr=1e-3, num_directions=80)
ONE = mezo.MeZOConfig(rank=2, alpha=4, target_modules=LINEARS, seed=3, lr=1e-3, name="one")
TOO_MANY = mezo.MeZOConfig(rank=1, target_modules=LINEARS, num_directions=450, name="too_many")


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine, no_engine_noise):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        return start_engine(
            model_dir,
            MANY,
            threads=1,
            max_loras_per_batch=2 + 2 * TOO_MANY.num_directions,
            skip_tokenizer_init=True,
            enable_tf32_matmul=True,
        )


def test_eighty_directions_of_options_of_several_tokens_attach_and_step(engine, model_dir):
    # 3 options of 1 to 3 tokens of each prompt: its prompt runs once for each of 160 copies.
    batch = random_batch(random.Random(5), size=3, kind="options")
    assert max(len(option) for options in batch.options for option in options) == 3
    with mezo.attach(engine, MANY) as run:
        theta = run.weights()
        result = run.step(batch)
        assert result.status is mezo.StepStatus.OK
        assert len(result.losses) == 80
        model = peft_model(model_dir, MANY)
        for index in (0, 41, 79):
            for sign, ours in zip((1, -1), result.losses[index], strict=True):
                scale = sign * MANY.eps
                set_lora(model, perturbed(theta, Direction(MANY.seed, 0, index), scale))
                with torch.no_grad():
                    theirs = reference_loss(model, batch)
                assert ours == pytest.approx(theirs.item(), abs=2e-5)
        assert run.step(batch).step == 1


def test_arrays_and_tensors_are_worth_what_lists_are(engine):
    ids = {"prompts": [[5, 6], [7, 8]], "options": [[3, 9], [4, 9]], "labels": [0, 1]}
    results = []
    for kind, lr in ((list, 2e-3), (np.array, np.float64(2e-3)), (torch.tensor, np.array(2e-3))):
        with mezo.attach(engine, ONE) as run:
            batch = mezo.Batch(**{name: kind(values) for name, values in ids.items()})
            first = run.step(batch, lr=lr)
            run.apply_update(kind([0.5]))
            measured = run.measure(batch, eps=np.float64(1e-3), offset=np.int64(1))
            results.append((first.losses, first.coefficients, measured.losses))
    assert results[0] == results[1] == results[2]
    config = mezo.MeZOConfig(
        rank=np.int64(2),
        alpha=torch.tensor(4),
        target_modules=np.array(LINEARS),
        seed=np.uint64(3),
        lr=np.float64(1e-3),
        eps=np.float64(1e-2),
        name="one",
    )
    with mezo.attach(engine, config) as run:
        assert run.step(mezo.Batch(**ids), lr=2e-3).losses == results[0][0]


def test_the_callers_tokenizer_is_used(engine):
    text = mezo.Batch(prompts=["w5 w6", "w7"], completions=[" w8", " w9 w10"])
    ids = mezo.Batch(prompts=[[5, 6], [7]], completions=[[8], [9, 10]])
    with mezo.attach(engine, ONE, tokenizer=make_tokenizer()) as run:
        assert run.evaluate(text) == run.evaluate(ids)
    with mezo.attach(engine, ONE) as run, pytest.raises(ValueError, match="text needs a tokenizer"):
        run.evaluate(text)
    with pytest.raises(TypeError, match="tokenizer must be a Hugging Face tokenizer, got 'gpt2'"):
        mezo.attach(engine, ONE, tokenizer="gpt2")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda run, b: run.step(b, lr="1e-3"), "lr must be a finite number >= 0, got '1e-3'"),
        (lambda run, b: run.step(b, lr=-1e-3), "lr must be a finite number >= 0, got -0.001"),
        (lambda run, b: run.step({"prompts": []}), "batch must be a mezo.Batch, got dict"),
        (lambda run, b: run.measure(b, eps=float("nan")), "eps must be .* got nan"),
        (lambda run, b: run.measure(b, offset=0.5), "offset must be an integer .* got 0.5"),
        (lambda run, b: run.evaluate(None), "batch must be a mezo.Batch, got None"),
        (lambda run, b: run.apply_update(["0.1"]), r"coefficients\[0\] must be .* got '0.1'"),
        (lambda run, b: run.save(None), "directory must be a path, got None"),
    ],
)
def test_a_wrong_argument_is_named_and_changes_nothing(engine, call, sentence):
    batch = random_batch(random.Random(6), size=2)
    with mezo.attach(engine, ONE) as run:
        before = run.weights()
        with pytest.raises(ValueError, match=sentence):
            call(run, batch)
        assert run.steps == 0
        assert all(torch.equal(value, before[name]) for name, value in run.weights().items())


def test_an_engine_too_small_for_one_row_is_refused_at_attach(engine):
    with mezo.attach(engine, ONE) as run:
        free = run.session.free_memory()
    with pytest.raises(ValueError, match="attach: max_running_requests must be at least 900,"):
        mezo.attach(engine, TOO_MANY)
    with mezo.attach(engine, ONE) as run:
        assert run.session.free_memory() == free
    with mezo.attach(engine, MANY):  # no slot was kept
        pass


def test_the_schedulers_reduced_products_are_told_at_attach(engine, caplog):
    # enable_tf32_matmul calls torch.set_float32_matmul_precision("high") there.
    with caplog.at_level(logging.WARNING, logger="mezo"):
        mezo.attach(engine, ONE).close()
    told = [r.getMessage() for r in caplog.records if "fp32 products" in r.getMessage()]
    assert len(told) == 1
    assert "got tf32 in SGLang's scheduler processes" in told[0]


def test_explicit_threads_went_before_the_environments(engine):
    children = psutil.Process().children(recursive=True)  # ended ones of other engines among them
    environments = [c.environ() for c in children if c.status() != psutil.STATUS_ZOMBIE]
    threads = {e["OMP_NUM_THREADS"] for e in environments if "MEZO_LAUNCH_REPORT" in e}
    assert threads == {"1"}
