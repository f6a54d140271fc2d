"""SGLang continues a run's prompts token for token as transformers, and takes weights over."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
import torch

import mezo
from tests.support.tiny import LINEARS, load_model, make_tokenizer, random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(
    rank=4, alpha=8, target_modules=LINEARS, lr=1e-2, seed=12, invocation=" w77 w8"
)
PROMPTS = ["w20 w31 w42", "w9", "w77 w8 w50 w51 w52 w53"]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    return start_engine(model_dir, CONFIG)


@pytest.mark.parametrize("prefix", ["exact", "activated"])
def test_both_engines_make_the_same_tokens(engine, model_dir, prefix):
    config = dataclasses.replace(CONFIG, prefix=prefix)
    rng = random.Random(prefix)
    batch = random_batch(rng)
    with (
        mezo.attach(engine, config) as run,
        mezo.attach(load_model(model_dir), config, tokenizer=make_tokenizer()) as reference,
    ):
        for _ in range(6):
            reference.step(random_batch(rng), lr=0.1)
        untrained = run.generate(PROMPTS, max_new_tokens=12)
        weights = reference.weights()
        run.set_weights(weights)
        assert all(torch.equal(weights[name], value) for name, value in run.weights().items())
        assert run.evaluate(batch).loss == pytest.approx(reference.evaluate(batch).loss, abs=1e-5)
        trained = run.generate(PROMPTS, max_new_tokens=12)
        assert trained == reference.generate(PROMPTS, max_new_tokens=12)
        base = run.generate(PROMPTS, max_new_tokens=12, base=True)
        assert base == reference.generate(PROMPTS, max_new_tokens=12, base=True)
        assert trained not in (base, untrained)
        words = trained[0].split()
        assert run.generate(PROMPTS[:1], max_new_tokens=12, stop=words[3])[0].split() == words[:3]


@pytest.mark.parametrize("prefix", ["exact", "activated"])
def test_another_run_with_the_same_weights_gives_the_same_bits(engine, prefix):
    config = dataclasses.replace(CONFIG, prefix=prefix)
    rng = random.Random(prefix)
    batch = random_batch(rng, size=6, kind="classification")
    with mezo.attach(engine, config) as run:
        for _ in range(4):
            run.step(random_batch(rng), lr=0.1)
        weights, scores = run.weights(), run.evaluate(batch)
        texts = run.generate(PROMPTS, max_new_tokens=6)
    engine.flush_cache()
    with mezo.attach(engine, config) as run:
        assert run.evaluate(batch).loss != scores.loss
        run.set_weights(weights)
        again = run.evaluate(batch)
        assert (again.loss, again.predictions) == (scores.loss, scores.predictions)
        assert run.generate(PROMPTS, max_new_tokens=6) == texts


def test_weights_that_do_not_fit_are_refused_by_every_rank(engine):
    with mezo.attach(engine, CONFIG) as run:
        before = run.weights()
        with pytest.raises(ValueError, match=r"set_weights: weights must be those of the 28"):
            run.set_weights({"other": torch.zeros(1, 1)})
        assert all(torch.equal(before[name], value) for name, value in run.weights().items())


def test_a_running_event_loop_is_named(engine):
    async def ask(run):
        return run.generate(["w5"])

    with (
        mezo.attach(engine, CONFIG) as run,
        pytest.raises(RuntimeError, match=r"no event loop may be running .* engine.async_generate"),
    ):
        asyncio.run(ask(run))


def test_an_engine_that_cannot_serve_the_run_says_why(engine):
    with mezo.attach(engine, CONFIG) as run:
        run.session.info = dataclasses.replace(run.session.info, not_served="pages are too long.")
        with pytest.raises(NotImplementedError, match=r"^generate: pages are too long\.$"):
            run.generate(["w5"])
        assert len(run.generate(["w5"], max_new_tokens=2, base=True)) == 1
