"""Ctrl-C and threads on the transformers engine: no step is lost, none is taken twice."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest
import torch

import mezo
from mezo._signals import uninterrupted
from mezo.core.messages import ProgressReply
from tests.support.interrupts import interrupted
from tests.support.tiny import LINEARS, load_model, random_batch

CONFIG = mezo.MeZOConfig(rank=4, target_modules=LINEARS, lr=1e-2, seed=4)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


def test_a_block_is_finished_before_the_interrupt_is_raised():
    done = []

    def block():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)
            with uninterrupted():  # nested blocks end with the outermost
                done.append(2)
            done.append(3)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_in_a_block_is_not_hidden():
    with pytest.raises(ValueError, match="inside"), uninterrupted():
        raise ValueError("inside")


def test_interrupts_at_any_moment_lose_no_step_and_take_none_twice(model_dir):
    rng = random.Random(0)
    batches = [random_batch(rng) for _ in range(12)]
    with mezo.attach(load_model(model_dir), CONFIG) as run:
        expected = [run.step(batch) for batch in batches]
        weights = run.weights()
    step_s = sum(r.timings["total"] for r in expected) / len(expected)
    with mezo.attach(load_model(model_dir), CONFIG) as run:
        found = [None] * len(batches)

        def take():
            number = run.steps
            found[number] = run.step(batches[number])

        for _ in range(40):
            if run.steps == len(batches):
                break
            interrupted(take, after=rng.uniform(0, 1.5) * step_s)
            run.sync()
            if run.steps:
                # Also where the interrupt came behind the step, before its result was kept.
                found[run.steps - 1] = run.last_result
        while run.steps < len(batches):
            take()
        assert [r.losses for r in found] == [r.losses for r in expected]
        assert [r.step for r in found] == list(range(len(batches)))
        assert all(torch.equal(run.weights()[name], weights[name]) for name in weights)


def test_an_interrupted_step_that_was_taken_is_known_afterwards(model_dir, monkeypatch, caplog):
    batch = random_batch(random.Random(1))
    with (
        mezo.attach(load_model(model_dir), CONFIG) as truth,
        mezo.attach(load_model(model_dir), CONFIG) as run,
    ):
        expected = [truth.step(batch), truth.step(batch)]
        real = run.session.step

        def interrupted_step(request):
            real(request)
            raise KeyboardInterrupt

        monkeypatch.setattr(run.session, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            run.step(batch)
        monkeypatch.setattr(run.session, "step", real)
        late = run.sync()
        assert (late.step, late.losses) == (0, expected[0].losses)
        assert "step 0 was interrupted, but the engine has taken it" in caplog.text
        assert run.sync() is None
        assert run.step(batch).losses == expected[1].losses
        assert run.steps == 2


def test_a_number_is_taken_once(model_dir):
    batch = random_batch(random.Random(2))
    with mezo.attach(load_model(model_dir), CONFIG) as run:
        run.step(batch)
        with pytest.raises(ValueError, match="must be that of the next step, 1, got 0"):
            run.session.step(run.request(batch, step=0, lr=1e-3))
        with pytest.raises(ValueError, match="must be that of the next step, 1, got 2"):
            run.session.apply_updates(2, [[1e-3]])
        run.apply_update([])  # a skipped step has a number, too
        assert run.session.progress() == ProgressReply(steps=2, last=None)
        assert run.step(batch).step == 2


def test_a_step_in_one_thread_and_evaluations_in_another(model_dir):
    rng = random.Random(3)
    batches = [random_batch(rng, kind="classification") for _ in range(15)]
    fixed = random_batch(rng, kind="classification")
    with mezo.attach(load_model(model_dir), CONFIG) as run:
        expected, scores = [], [run.evaluate(fixed).loss]
        for batch in batches:
            expected.append(run.step(batch).losses)
            scores.append(run.evaluate(fixed).loss)
    with mezo.attach(load_model(model_dir), CONFIG) as run:
        seen, stop = [], threading.Event()

        def evaluate():
            while not stop.is_set():
                seen.append(run.evaluate(fixed).loss)

        thread = threading.Thread(target=evaluate)
        thread.start()
        found = [run.step(batch).losses for batch in batches]
        stop.set()
        thread.join()
    assert found == expected
    assert set(seen) <= set(scores)


def test_a_model_in_training_mode_is_refused(model_dir):
    model = load_model(model_dir)
    with mezo.attach(model, CONFIG) as run:
        model.train()
        with pytest.raises(ValueError, match=r"must be in eval mode.*call model.eval\(\)"):
            run.step(random_batch(random.Random(4)))
        model.eval()
        assert run.step(random_batch(random.Random(4))).step == 0


def test_what_fails_in_attach_leaves_the_model_as_it_was(model_dir, monkeypatch):
    from mezo.engines import transformers

    model = load_model(model_dir)
    modules = {name: type(module) for name, module in model.named_modules()}

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(transformers, "AdapterState", fail)
    with pytest.raises(MemoryError, match="no room"):
        mezo.attach(model, CONFIG)
    assert {name: type(module) for name, module in model.named_modules()} == modules
