"""Steps in SGLang's breakable prefill runner: kept, with our attention and log-likelihoods in it."""

from __future__ import annotations

import dataclasses
import random
import sys

import pytest

import mezo
from tests.support import planted
from tests.support.independent import (
    activated_pair,
    check_activated_step,
    check_against_algorithm_1,
)
from tests.support.tiny import random_batch

pytestmark = pytest.mark.sglang

MODULES = ("q_proj", "v_proj")
CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=MODULES, lr=1e-3, eps=1e-2, seed=1)
ACTIVATED = dataclasses.replace(CONFIG, prefix="activated", invocation=(77, 8), name="activated")


@pytest.fixture(scope="module", params=["llama", "opt"])
def model_dir(request, tiny_model_dir):
    return tiny_model_dir(request.param)


@pytest.fixture(scope="module")
def engine(model_dir, start_engine, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plugin")
    planted.install(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(directory), *sys.path])  # a spawned process takes it over
        return start_engine(model_dir, CONFIG, max_loras_per_batch=12)


@pytest.fixture(scope="module")
def plant(engine):
    """A function that changes something in the scheduler process until the next call."""
    with mezo.attach(engine, dataclasses.replace(CONFIG, name="by"), selftest=False) as run:
        yield lambda fault: run.session.call(planted.Plant(fault))


def test_steps_in_graphs_equal_algorithm_1_and_peft(engine, model_dir, plant):
    rng = random.Random(0)
    pair = activated_pair(model_dir, ACTIVATED)
    plant("prefill_graphs")
    with mezo.attach(engine, CONFIG) as run:
        batches = [random_batch(rng, kind=k) for k in ("completion", "classification") * 2]
        check_against_algorithm_1(run, model_dir, batches)
    with mezo.attach(engine, ACTIVATED) as run:
        for kind in ("completion", "classification") * 2:
            check_activated_step(run, pair, random_batch(rng, kind=kind))
    plant("graphs_were_replayed")
