"""Warnings about trainings that will not learn: each is said once, with its remedy."""

from __future__ import annotations

import random

import pytest
import torch

import mezo
from mezo.results import StepResult, StepStatus
from mezo.train.callbacks import Progress
from mezo.train.watch import WINDOW, Watch, check_rows
from tests.support.tiny import load_model, make_tokenizer, random_batch


@pytest.fixture
def attach(tiny_model_dir):
    runs = []

    def make(**config):
        model = load_model(tiny_model_dir("llama"))
        config = {"rank": 2, "eps": 1e-3, **config}
        runs.append(mezo.attach(model, mezo.MeZOConfig(**config), tokenizer=make_tokenizer()))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def steps(watch, count, *, grad=1.0, noise=5.0, coefficient=1e-3):
    for _ in range(count):
        result = StepResult(
            step=0,
            loss=1.0,
            loss_plus=1.0,
            loss_minus=1.0,
            losses=((1.0, 1.0),),
            projected_grads=(grad,),
            coefficients=(coefficient,),
            signal_to_noise=(noise,),
            status=StepStatus.OK,
            tokens=1,
            prompt_tokens=0,
            reused_tokens=0,
            forwards=1,
            timings={},
        )
        watch(Progress(1, 1, 0.0, result=result))


@pytest.mark.parametrize(
    ("eps", "words"), [(10.0, "lower eps to about"), (1e-9, "raise eps to about"), (1e-3, None)]
)
def test_eps_far_from_the_weights(eps, words, attach):
    said = []
    watch = Watch(attach(eps=eps), said.append)
    watch.begin(10)
    watch.begin(10)
    assert [words in sentence for sentence in said] == ([True] if words else [])


def test_noise_for_a_whole_window(attach):
    said = []
    watch = Watch(attach(), said.append)
    steps(watch, WINDOW - 1, noise=0.5)
    steps(watch, 1, noise=2.0)
    steps(watch, WINDOW - 1, noise=0.5)
    assert said == []
    steps(watch, 3 * WINDOW, noise=0.5)
    assert len(said) == 1
    assert "signal_to_noise was below 1 in the last 50 steps" in said[0]


def test_gradients_that_grow(attach):
    said = []
    watch = Watch(attach(), said.append)
    steps(watch, WINDOW, grad=1.0)
    steps(watch, WINDOW, grad=-9.0)
    assert said == []
    steps(watch, 2 * WINDOW, grad=-11.0)
    assert len(said) == 1
    assert "has grown from 1 in the first 50 steps to 11; lower lr, or give clip 2" in said[0]


def test_updates_that_rounding_swallows(attach):
    run, said = attach(), []
    watch = Watch(run, said.append)
    steps(watch, WINDOW, coefficient=1e-6)
    assert said == []  # fp32 can tell them apart
    run.session.dtype = torch.bfloat16
    steps(watch, 2 * WINDOW, coefficient=1e-6)
    assert len(said) == 1
    assert "smaller than what bfloat16 can tell apart" in said[0]
    assert "raise lr, or start the engine in float32" in said[0]


def test_options_that_begin_alike(attach):
    run, said = attach(), []
    batch = mezo.Batch(
        prompts=["w5", "w6"], options=[[" w7 w8", " w7 w9"], [" w8", " w9"]], labels=[0, 1]
    )
    check_rows(run, run.encode(batch), said.append)
    assert len(said) == 1
    assert "options of 1 of 2 examples begin with the same token" in said[0]
    check_rows(run, run.encode(random_batch(random.Random(0))), said.append)
    assert len(said) == 1


def test_a_cache_that_is_smaller_than_the_prompts(attach):
    run, said = attach(prefix="activated", invocation=[9]), []
    batch = mezo.Batch(prompts=["w5 w6 w7", "w5 w6 w7", "w8"], completions=[" w9"] * 3)
    encoded = run.encode(batch)
    check_rows(run, encoded, said.append)
    assert said == []  # the engine keeps no cache
    run.session.cache_tokens = lambda: 4
    check_rows(run, encoded, said.append)
    assert said == []
    run.session.cache_tokens = lambda: 3
    check_rows(run, encoded, said.append)
    assert "the prompts of one epoch have 4 tokens and the engine's cache has room for 3" in said[0]
    assert "max_total_tokens" in said[0]
