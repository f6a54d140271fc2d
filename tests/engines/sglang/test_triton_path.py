"""The path of a GPU host, in Triton's interpreter: SGLang's LoRA kernels in Triton, and ours.

Its other LoRA backend, csgmv, looks its tuning up by the name of a GPU, which is not there.
"""

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
from tests.support.tiny import LINEARS, random_batch

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

CONFIG = mezo.MeZOConfig(rank=8, alpha=16, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=17)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    with pytest.MonkeyPatch.context() as patch:
        # For the engine's processes, which start now; triton decides at its import.
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("MEZO_KERNELS_BACKEND", "triton")
        return start_engine(model_dir, CONFIG, lora_backend="triton", max_total_tokens=2048)


def test_steps_equal_algorithm_1(engine, model_dir):
    rng = random.Random(0)
    with mezo.attach(engine, CONFIG) as run:
        batches = [random_batch(rng, size=2, kind=k) for k in ("completion", "classification")]
        check_against_algorithm_1(run, model_dir, batches)


def test_activated_steps_equal_base_keys_and_values_with_peft(engine, model_dir):
    config = dataclasses.replace(CONFIG, prefix="activated", invocation=(77, 8), name="activated")
    rng = random.Random(1)
    pair = activated_pair(model_dir, config)
    with mezo.attach(engine, config) as run:
        batch = random_batch(rng, size=2, kind="classification")
        check_activated_step(run, pair, batch)
        assert check_activated_step(run, pair, batch).prompt_tokens == 0
