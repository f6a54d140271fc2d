"""One conversation with an engine: interrupts, threads, event loops, other people's processes."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import random
import signal
import threading
import time

import psutil
import pytest

import mezo
from mezo.core.messages import Fingerprint
from tests.support.independent import load_peft, row_logprobs
from tests.support.interrupts import interrupted
from tests.support.tiny import LINEARS, load_model, random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=6)
OTHER = dataclasses.replace(CONFIG, name="second", seed=7)
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    return start_engine(model_dir, CONFIG, max_loras_per_batch=8, max_total_tokens=8192)


@pytest.fixture(scope="module")
def truth_of(model_dir):
    """A function (config, batches) -> the losses of these steps on plain transformers."""

    def steps(config, batches):
        with mezo.attach(load_model(model_dir), config) as run:
            return [run.step(batch).losses[0] for batch in batches]

    return steps


def slow_batch(rng):
    """A step of some tenths of a second."""
    return random_batch(rng, size=300)


@pytest.mark.parametrize("after", [0.02, 0.1])
def test_an_interrupted_step_answers_nobody_else(engine, truth_of, after):
    rng = random.Random(0)
    batches = [slow_batch(rng), random_batch(rng), random_batch(rng)]
    expected = truth_of(CONFIG, batches)
    with mezo.attach(engine, CONFIG) as run:
        interrupted(lambda: run.step(batches[0]), after=after)
        run.sync()
        found = [run.last_result] if run.steps else []
        found += [run.step(batch) for batch in batches[len(found) :]]
        assert [r.step for r in found] == [0, 1, 2]
        for result, losses in zip(found, expected, strict=True):
            assert result.losses[0] == pytest.approx(losses, abs=1e-5)


def test_an_interrupt_before_the_message_is_sent(engine, truth_of, monkeypatch):
    from mezo.engines.sglang import conversation

    batch = random_batch(random.Random(1))
    with mezo.attach(engine, CONFIG) as run:
        real = conversation.compat.send

        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(conversation.compat, "send", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.step(batch)
        monkeypatch.setattr(conversation.compat, "send", real)
        assert run.sync() is None
        assert run.steps == 0
        assert run.step(batch).losses[0] == pytest.approx(truth_of(CONFIG, [batch])[0], abs=1e-5)


def test_an_interrupted_evaluation_and_save(engine, tmp_path):
    rng = random.Random(2)
    with mezo.attach(engine, CONFIG) as run:
        small, big = random_batch(rng), slow_batch(rng)
        loss = run.evaluate(small).loss
        interrupted(lambda: run.evaluate(big), after=0.05)
        assert run.evaluate(small).loss == loss
        weights = run.weights()
        interrupted(lambda: [run.save(tmp_path) for _ in range(1000)], after=0.05)
        assert run.evaluate(small).loss == loss
        assert run.weights().keys() == weights.keys()


def test_sglangs_own_calls_do_not_read_our_replies(engine):
    with mezo.attach(engine, CONFIG) as run:
        interrupted(lambda: run.step(slow_batch(random.Random(3))), after=0.05)
        # Were our reply read here, a success, this would not raise.
        with pytest.raises(AssertionError, match="no_such_method"):
            engine.collective_rpc("no_such_method")


def test_two_runs_in_two_threads_and_evaluations_in_a_third(engine, truth_of):
    rng = random.Random(4)
    batches = {c.name: [random_batch(rng) for _ in range(12)] for c in (CONFIG, OTHER)}
    fixed = random_batch(rng)
    expected = {c.name: truth_of(c, batches[c.name]) for c in (CONFIG, OTHER)}
    with mezo.attach(engine, CONFIG) as one, mezo.attach(engine, OTHER) as two:
        base = one.evaluate(fixed, base=True).loss
        found, bases, stop = {}, [], threading.Event()

        def train(run):
            found[run.name] = [run.step(b).losses[0] for b in batches[run.name]]

        def evaluate():
            while not stop.is_set():
                bases.append(two.evaluate(fixed, base=True).loss)

        threads = [threading.Thread(target=train, args=(run,)) for run in (one, two)]
        reader = threading.Thread(target=evaluate)
        for thread in (*threads, reader):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        reader.join()
    assert set(bases) == {base}
    for name, losses in expected.items():
        for ours, theirs in zip(found[name], losses, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_child_of_the_callers_may_end(engine):
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    child.start()
    free = None
    with mezo.attach(engine, CONFIG) as run:  # the child is alive, or not yet looked after
        free = run.session.free_memory()
        child.join(60)
        assert run.step(random_batch(random.Random(5))).status is mezo.StepStatus.OK
        run.close()
    with mezo.attach(engine, CONFIG) as run:  # the name and the slots are free again
        assert run.session.free_memory() == free


def test_interrupts_do_not_reach_sglangs_processes(engine):
    """A terminal sends Ctrl-C to all of them."""
    with mezo.attach(engine, CONFIG) as run:
        for pid in engine.get_all_child_pids():
            os.kill(pid, signal.SIGINT)
        time.sleep(1.5)  # SGLang's watchdog looks every second
        assert all(psutil.pid_exists(pid) for pid in engine.get_all_child_pids())
        run.step(random_batch(random.Random(6)))
        assert engine.generate(input_ids=[1, 5, 9], sampling_params=GREEDY)["output_ids"]


def test_attach_step_and_close_where_another_loop_is_running(engine):
    """As in a FastAPI handler: the loop is not the engine's."""
    batch = random_batch(random.Random(7))

    async def handler():
        with mezo.attach(engine, CONFIG) as run:
            return run.step(batch).losses

    first, second = asyncio.run(handler()), asyncio.run(handler())
    assert first == second


def test_attach_step_and_close_where_the_engines_loop_is_running(engine, model_dir, tmp_path):
    """As in a notebook; requests for the run are served in between."""
    prompt = [1, 5, 9, 300, 44]

    async def cell():
        run = mezo.attach(engine, CONFIG)
        run.step(random_batch(random.Random(8)))
        output = await engine.async_generate(
            input_ids=prompt, sampling_params=GREEDY, lora_path=run.name, return_logprob=True
        )
        adapter = run.save(tmp_path)
        long = {**GREEDY, "max_new_tokens": 100}
        running = asyncio.ensure_future(
            engine.async_generate(input_ids=prompt, sampling_params=long, lora_path=run.name)
        )
        while not engine.tokenizer_manager.rid_to_state:
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match=r"no request may be using run 'mezo', got 1"):
            run.close()
        run.step(random_batch(random.Random(8)))  # still open
        await running
        run.close()
        return output, adapter

    output, adapter = engine.loop.run_until_complete(cell())
    found = [t[0] for t in output["meta_info"]["output_token_logprobs"]]
    row = [*prompt, *output["output_ids"]]
    expected = row_logprobs(load_peft(model_dir, adapter), row, len(prompt))
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    mezo.attach(engine, CONFIG).close()


def test_close_waits_for_requests_where_no_loop_is_running(engine):
    run = mezo.attach(engine, CONFIG)
    sampling = {**GREEDY, "max_new_tokens": 60}
    task = engine.loop.create_task(
        engine.async_generate(input_ids=[1, 5, 9], sampling_params=sampling, lora_path=run.name)
    )
    engine.loop.run_until_complete(asyncio.sleep(0.05))
    assert not task.done()
    run.close()
    assert len(task.result()["output_ids"]) == 60
    mezo.attach(engine, CONFIG).close()


def test_attach_in_a_thread_while_the_engines_loop_steps(engine):
    """As with asyncio.to_thread in a notebook: neither waits for the other."""
    rng = random.Random(12)
    batches = [random_batch(rng) for _ in range(40)]
    with mezo.attach(engine, CONFIG) as one:

        async def stepper():
            for batch in batches:
                one.step(batch)
                await asyncio.sleep(0)

        async def attacher():
            for number in range(4):
                other = dataclasses.replace(OTHER, name=f"other{number}")
                run = await asyncio.to_thread(mezo.attach, engine, other)
                await asyncio.to_thread(run.step, batches[0])
                await asyncio.to_thread(run.close)

        async def both():
            await asyncio.wait_for(asyncio.gather(stepper(), attacher()), 120)

        engine.loop.run_until_complete(both())
        assert one.steps == len(batches)


def test_attach_where_the_cache_is_full(engine):
    """The self-test's own forwards may evict what requests have left there."""
    rng = random.Random(13)
    size = engine.server_args.max_total_tokens
    prompts = [[1, *(rng.randrange(3, 500) for _ in range(200))] for _ in range(size // 150)]
    for prompt in prompts:
        engine.generate(input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": 1})
    with mezo.attach(engine, CONFIG) as run:
        free = run.session.free_memory()
        assert free["evictable_tokens"] > 0.9 * size
        run.step(random_batch(rng))
    engine.flush_cache()


def test_attach_while_requests_hold_the_engine(engine, caplog):
    """The self-test is left out then, and says so; steps wait for nobody either."""
    sampling = {**GREEDY, "max_new_tokens": 40}

    async def cell():
        slots = engine.server_args.max_running_requests
        requests = [
            asyncio.ensure_future(
                engine.async_generate(input_ids=[1, 5, i], sampling_params=sampling)
            )
            for i in range(3, slots + 40)
        ]
        while len(engine.tokenizer_manager.rid_to_state) < len(requests):
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        run = mezo.attach(engine, CONFIG)
        await asyncio.gather(*requests)
        run.step(random_batch(random.Random(14)))
        run.close()

    engine.loop.run_until_complete(cell())
    if "self-test skipped" in caplog.text:  # unless they had ended by then
        assert "no room for its rows now, as other requests run" in caplog.text


def test_an_attach_that_fails_late_leaves_nothing_behind(engine, monkeypatch):
    from mezo.engines.sglang import registry

    with mezo.attach(engine, CONFIG) as run:
        before = run.session.call(Fingerprint()).slots.keys()
    for error in (ValueError("no"), KeyboardInterrupt()):

        def fail(*args, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(registry, "register", fail)
            with pytest.raises(type(error)):
                mezo.attach(engine, CONFIG)
    with mezo.attach(engine, CONFIG) as run:
        assert run.session.call(Fingerprint()).slots.keys() == before


def test_an_attach_is_interrupted(engine):
    for after in (0.0, 0.01, 0.03):
        interrupted(lambda: mezo.attach(engine, CONFIG).close(), after=after)
        with mezo.attach(engine, CONFIG) as run:
            run.step(random_batch(random.Random(9)))


def test_a_closed_runs_name_is_unknown(engine):
    with mezo.attach(engine, CONFIG) as run:
        request = {"input_ids": [1, 5, 9], "sampling_params": GREEDY, "lora_path": run.name}
        assert engine.generate(**request)["output_ids"]
    with pytest.raises(ValueError, match="LoRA adapter that has never been loaded: mezo"):
        engine.generate(**request)
    assert engine.generate(**{**request, "lora_path": None})["output_ids"]


def test_an_adapter_that_somebody_unloads_keeps_its_weights(engine, tmp_path):
    rng = random.Random(10)
    with mezo.attach(engine, CONFIG) as run:
        run.step(random_batch(rng))
        weights = run.weights()
        assert engine.unload_lora_adapter(run.name).success
        for call in (
            lambda: run.step(random_batch(rng)),
            lambda: run.evaluate(random_batch(rng)),
            lambda: run.apply_update([1e-3]),
        ):
            with pytest.raises(RuntimeError, match=r"got its slots \['theta'\] unloaded.*save"):
                call()
        assert run.steps == 1
        run.save(tmp_path)
        assert all((run.weights()[name] == value).all() for name, value in weights.items())
    with mezo.attach(engine, CONFIG) as run:
        run.step(random_batch(rng))


def test_calls_after_a_shutdown_say_so(engine):
    run = mezo.attach(engine, CONFIG)
    run.step(random_batch(random.Random(11)))
    shutdown = threading.Timer(0.1, engine.shutdown)  # in the middle of a step
    shutdown.start()

    def steps():
        for _ in range(100):
            run.step(slow_batch(random.Random(11)))

    with pytest.raises(RuntimeError, match=r"must be (alive|running)"):
        steps()
    shutdown.join()
    for call in (lambda: run.step(random_batch(random.Random(11))), run.weights, run.sync):
        with pytest.raises(RuntimeError, match=r"must be (alive|running)") as error:
            call()
        assert "What was not saved is gone" in str(error.value)
    run.close()
    run.close()
