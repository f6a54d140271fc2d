"""Steps in SGLang's breakable prefill runner, which stays and has our parts in it."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest

import mezo
from mezo.engines.sglang.batch.prefill_graph import breakable_only, is_breakable
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
    return planted.start(start_engine, tmp_path_factory, model_dir, CONFIG, max_loras_per_batch=12)


@pytest.fixture(scope="module")
def plant(engine):
    """A function that changes something in the scheduler process until the next call."""
    with mezo.attach(engine, dataclasses.replace(CONFIG, name="by"), selftest=False) as run:
        yield lambda fault: run.session.call(planted.Plant(fault))


@pytest.fixture
def check_steps(engine, model_dir):
    """A function that compares steps of both modes with Algorithm 1 and PEFT."""
    pair = activated_pair(model_dir, ACTIVATED)

    def check():
        rng = random.Random(0)
        with mezo.attach(engine, CONFIG) as run:
            batches = [random_batch(rng, kind=k) for k in ("completion", "classification") * 2]
            check_against_algorithm_1(run, model_dir, batches)
        with mezo.attach(engine, ACTIVATED) as run:
            for kind in ("completion", "classification") * 2:
                check_activated_step(run, pair, random_batch(rng, kind=kind))

    return check


def test_steps_in_graphs_equal_algorithm_1_and_peft(plant, check_steps):
    plant("prefill_graphs")
    check_steps()
    plant("graphs_were_replayed")


def test_the_engines_attention_is_not_told_of_batches_that_ours_does(plant, check_steps):
    plant("told_of_our_batches")
    check_steps()


def test_the_engines_attention_is_told_before_it_does_a_layer(plant, check_steps):
    plant("every_layer_is_the_engines")
    check_steps()


def test_sglangs_runner_says_which_graphs_can_stay(no_engine_noise):
    """Another name for what is asked would switch the graphs off, and fails here."""
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.model_executor.runner import EagerRunner, PrefillCudaGraphRunner

    graph = object.__new__(PrefillCudaGraphRunner)
    assert graph.__class__._uses_eager_prefill_tail
    stays = {}
    for name in Backend.ALL:
        graph.prefill_backend_name = name
        stays[name] = is_breakable(graph)
    assert stays == {name: name == "breakable" for name in Backend.ALL}
    assert not is_breakable(object.__new__(EagerRunner))
    # A breakable graph with the logits in it, as it might be one day.
    inside = SimpleNamespace(
        prefill_backend_name="breakable", _uses_eager_prefill_tail=lambda: False
    )
    assert not is_breakable(inside)


@pytest.mark.parametrize(("name", "stays"), [("breakable", True), ("full", False)])
def test_other_graphs_are_put_aside_for_a_batch(name, stays):
    graph = SimpleNamespace(prefill_backend_name=name, _uses_eager_prefill_tail=lambda: True)
    runner = SimpleNamespace(prefill_cuda_graph_runner=graph)
    with breakable_only(runner):
        assert (runner.prefill_cuda_graph_runner is graph) is stays
    assert runner.prefill_cuda_graph_runner is graph
