"""OPT, the model of the paper: SGLang has no sizes of its layers for LoRA, our plugin adds them."""

from __future__ import annotations

import dataclasses
import random

import pytest

import mezo
from tests.support.independent import (
    activated_pair,
    check_activated_step,
    check_against_algorithm_1,
)
from tests.support.tiny import random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(
    rank=4,
    alpha=8,
    target_modules=("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
    lr=1e-3,
    eps=1e-2,
    seed=13,
)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("opt")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    return start_engine(model_dir, CONFIG)


def test_algorithm_1_gives_the_same_losses_and_update(engine, model_dir):
    rng = random.Random(0)
    with mezo.attach(engine, CONFIG) as run:
        check_against_algorithm_1(run, model_dir, [random_batch(rng) for _ in range(5)])


def test_activated_steps_equal_base_keys_and_values_with_peft(engine, model_dir):
    config = dataclasses.replace(CONFIG, prefix="activated", invocation=(77, 8), name="activated")
    rng = random.Random(1)
    pair = activated_pair(model_dir, config)
    with mezo.attach(engine, config) as run:
        for kind in ("completion", "classification") * 2:
            check_activated_step(run, pair, random_batch(rng, kind=kind))
