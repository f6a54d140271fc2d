"""Whatever ends a training, what was trained is kept; what can be checked is checked before it."""

from __future__ import annotations

import itertools
import logging
import os
import random
import shutil
import signal

import pytest

import mezo
import mezo.core.state
import mezo.run
from tests.support.files import saved_weights
from tests.support.independent import check_replay, load_peft
from tests.support.tiny import LINEARS, load_model, random_batch

CONFIG = mezo.MeZOConfig(rank=2, target_modules=LINEARS, lr=1e-3, seed=1)
TOO_LONG = mezo.Batch(prompts=[[1] * 300], completions=[[5]])  # the tiny models take 256 tokens


@pytest.fixture
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"))


def good_batches(count: int):
    rng = random.Random(7)
    return [random_batch(rng) for _ in range(count)]


class Steps:
    """A callback that remembers the results, and may do something else after one of them."""

    def __init__(self, after: int | None = None, then=None) -> None:
        self.results = []
        self._after, self._then = after, then

    def __call__(self, progress) -> None:
        if progress.result is not None:
            self.results.append(progress.result)
            if len(self.results) == self._after:
                self._then()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stop_with(error: BaseException):
    def stop():
        raise error

    return stop


# What can be checked at the start.


def test_an_output_that_is_a_file_is_refused_before_anything(model, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "out" / "adapter_model.safetensors").mkdir(parents=True)
    for output, message in (
        ("file", "file must be a directory that can be written to, got a file"),
        ("file/below", "must be a directory that can be written to, got NotADirectoryError"),
        ("/proc/nothing", "nothing must be a directory that can be written to, got"),
        ("out", "adapter_model.safetensors must be a file or new, got a directory"),
    ):
        steps = Steps()
        with pytest.raises(ValueError, match=message):
            mezo.finetune(
                model,
                good_batches(3),
                num_steps=3,
                config=CONFIG,
                output=tmp_path / output,
                callbacks=[steps],
            )
        assert not steps.results


def test_a_missing_parent_is_made(model, tmp_path):
    output = tmp_path / "new" / "deeper"
    mezo.finetune(model, good_batches(2), num_steps=2, config=CONFIG, output=output)
    assert (output / "adapter_model.safetensors").is_file()


def test_a_list_is_checked_before_the_first_step(model, tmp_path):
    steps = Steps()
    for batches, message in (
        ([*good_batches(6), TOO_LONG], r"batches\[6\] is bad: .*at most 256 tokens .*got 301"),
        (good_batches(6), "batches must hold at least 7 batches, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            mezo.finetune(
                model, batches, num_steps=7, config=CONFIG, output=tmp_path, callbacks=[steps]
            )
    with pytest.raises(ValueError, match=r"held_out\[1\] is bad"):
        mezo.finetune(
            model,
            good_batches(1),
            num_steps=1,
            config=CONFIG,
            held_out=[*good_batches(1), TOO_LONG],
            callbacks=[steps],
        )
    assert not steps.results
    # What is not used need not be good.
    mezo.finetune(model, [*good_batches(1), TOO_LONG], num_steps=1, config=CONFIG)


class _Loader:
    """A stream with a length, as a torch DataLoader."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self):
        return iter(good_batches(self._count))


def test_a_stream_of_known_length_is_checked_before_the_first_step(model):
    steps = Steps()
    with pytest.raises(ValueError, match="at least 4 batches, got 3"):
        mezo.finetune(model, _Loader(3), num_steps=4, config=CONFIG, callbacks=[steps])
    assert not steps.results
    assert mezo.finetune(model, _Loader(3), num_steps=3, config=CONFIG).steps == 3
    with pytest.raises(TypeError, match=r"an iterable of mezo.Batch, got Batch; put"):
        mezo.finetune(model, good_batches(1)[0], num_steps=1, config=CONFIG)


def test_arguments_are_checked_before_an_engine_is_started(tmp_path):
    nowhere = str(tmp_path / "no_model")
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        mezo.finetune(nowhere, good_batches(1), num_steps=2)
    with pytest.raises(ValueError, match=r"schedule must be .* got 'sqrt'"):
        mezo.finetune(nowhere, good_batches(1), num_steps=1, schedule="sqrt")
    with pytest.raises(ValueError, match=r"num_steps must be an integer, got 1\.5"):
        mezo.finetune(nowhere, good_batches(1), num_steps=1.5)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a directory that can be written to"):
        mezo.finetune(nowhere, good_batches(1), num_steps=1, output=tmp_path / "file")


# What fails later.


def failing_streams():
    def bad_batch():
        yield from good_batches(6)
        yield TOO_LONG

    def broken_reader():
        yield from good_batches(6)
        raise OSError("the data is gone")

    def ctrl_c():
        yield from good_batches(6)
        interrupt()
        yield good_batches(7)[6]

    return {
        "bad_batch": (bad_batch, Steps, ValueError, "at most 256 tokens"),
        "broken_reader": (broken_reader, Steps, OSError, "the data is gone"),
        "ctrl_c_in_data": (ctrl_c, Steps, KeyboardInterrupt, None),
        "ctrl_c_in_callback": (
            lambda: itertools.cycle(good_batches(7)),
            lambda: Steps(6, interrupt),
            KeyboardInterrupt,
            None,
        ),
        "callback": (
            lambda: itertools.cycle(good_batches(7)),
            lambda: Steps(6, stop_with(ZeroDivisionError("mine"))),
            ZeroDivisionError,
            "mine",
        ),
        "exit": (
            lambda: itertools.cycle(good_batches(7)),
            lambda: Steps(6, stop_with(SystemExit(3))),
            SystemExit,
            "3",
        ),
    }


@pytest.mark.parametrize("case", failing_streams())
def test_what_fails_later_saves_what_was_trained(model, tiny_model_dir, tmp_path, case, caplog):
    stream, make_steps, kind, message = failing_streams()[case]
    steps = make_steps()
    with pytest.raises(kind, match=message) as raised:
        mezo.finetune(
            model, stream(), num_steps=10, config=CONFIG, output=tmp_path, callbacks=[steps]
        )
    assert len(steps.results) == 6
    check_replay(steps.results, saved_weights(tmp_path), CONFIG.seed)
    load_peft(tiny_model_dir("llama"), tmp_path)
    partial = raised.value.partial_training
    assert (partial.adapter, partial.weights) == (tmp_path, None)
    assert (partial.summary.steps, partial.summary.num_steps) == (6, 10)
    assert partial.summary.statuses == {"OK": 6}
    assert f"stopped by {kind.__name__} after 6 of 10 steps" in partial.summary.problems[0]
    said = [r.getMessage() for r in caplog.records]
    assert any(
        s.startswith("finetune: training stopped after 6 of 10 steps")
        and f"their weights are in {tmp_path}." in s
        for s in said
    )
    assert partial.sentence in getattr(raised.value, "__notes__", [partial.sentence])
    # The model is as it was.
    assert not any("LoraLinear" in type(m).__name__ for m in model.modules())


def test_a_model_that_fails_gives_its_adapter(model, tmp_path):
    steps = Steps()

    def fail(*args):
        if len(steps.results) == 3:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        mezo.finetune(
            model,
            itertools.repeat(good_batches(1)[0]),
            num_steps=5,
            config=CONFIG,
            output=tmp_path,
            callbacks=[steps],
        )
    check_replay(steps.results, saved_weights(tmp_path), CONFIG.seed)


def test_a_last_evaluation_that_fails_does_not_lose_the_training(model, tmp_path):
    steps = Steps()

    def fail_at_the_end(progress):
        if progress.evaluation is not None and progress.step == 3:
            raise OSError("no space left for my table")

    with pytest.raises(OSError, match="no space left") as raised:
        mezo.finetune(
            model,
            good_batches(3),
            num_steps=3,
            config=CONFIG,
            output=tmp_path,
            held_out=good_batches(1),
            callbacks=[steps, fail_at_the_end],
        )
    assert raised.value.partial_training.summary.steps == 3
    check_replay(steps.results, saved_weights(tmp_path), CONFIG.seed)


def test_a_stream_that_ends_early_is_saved_and_said(model, tmp_path, caplog):
    steps = Steps()
    summary = mezo.finetune(
        model,
        iter(good_batches(5)),
        num_steps=9,
        config=CONFIG,
        output=tmp_path,
        held_out=good_batches(1),
        callbacks=[steps],
    )
    check_replay(steps.results, saved_weights(tmp_path), CONFIG.seed)
    assert (summary.steps, summary.num_steps) == (5, 9)
    assert summary.after.loss != summary.before.loss
    assert "The stream of batches ended after 5 of 9 steps" in summary.problems[0]
    assert any("ended after 5 of 9 steps" in r.getMessage() for r in caplog.records)
    with pytest.raises(ValueError, match="at least 9 batches, got none; a generator can be used"):
        mezo.finetune(model, iter(()), num_steps=9, config=CONFIG)


def test_without_output_the_exception_has_the_weights(model):
    steps = Steps(2, stop_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError) as raised:
        mezo.finetune(model, good_batches(4), num_steps=4, config=CONFIG, callbacks=[steps])
    partial = raised.value.partial_training
    assert partial.adapter is None
    assert "error.partial_training.weights" in partial.sentence
    check_replay(steps.results, partial.weights, CONFIG.seed)


def test_a_disk_that_fails_at_the_end_gets_another_place(model, tmp_path, monkeypatch):
    output, other = tmp_path / "out", tmp_path / "temporary"
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))

    def take_the_disk_away():
        shutil.rmtree(output)
        output.touch()

    steps = Steps(4, take_the_disk_away)
    with pytest.raises(OSError, match="out") as raised:
        mezo.finetune(
            model, good_batches(4), num_steps=4, config=CONFIG, output=output, callbacks=[steps]
        )
    partial = raised.value.partial_training
    assert partial.adapter.parent == other
    assert f"in {partial.adapter}, as {output} failed" in partial.sentence
    check_replay(steps.results, saved_weights(partial.adapter), CONFIG.seed)


def test_where_nothing_can_be_written_the_exception_has_the_weights(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(mezo.run, "save_peft", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    steps = Steps(3, stop_with(ZeroDivisionError("first")))
    output = tmp_path / "out"
    with pytest.raises(ZeroDivisionError, match="first") as raised:
        mezo.finetune(
            model, good_batches(4), num_steps=4, config=CONFIG, output=output, callbacks=[steps]
        )
    partial = raised.value.partial_training
    assert partial.adapter is None
    assert "saving failed (OSError: disk full)" in partial.sentence
    check_replay(steps.results, partial.weights, CONFIG.seed)
    assert list(tmp_path.iterdir()) == [output]


def test_a_second_interrupt_while_saving_stops_at_once(model, tmp_path, monkeypatch):
    calls = []

    def slow(*args, **kwargs):
        calls.append(1)
        interrupt()
        raise AssertionError("not reached")

    monkeypatch.setattr(mezo.run, "save_peft", slow)
    with pytest.raises(KeyboardInterrupt):
        mezo.finetune(
            model,
            good_batches(4),
            num_steps=4,
            config=CONFIG,
            output=tmp_path,
            callbacks=[Steps(2, interrupt)],
        )
    assert len(calls) == 1
    assert not any("LoraLinear" in type(m).__name__ for m in model.modules())


def test_a_close_that_fails_does_not_hide_what_happened(model, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("the engine is gone")

    monkeypatch.setattr(mezo.Run, "close", fail)
    with pytest.raises(ZeroDivisionError):
        mezo.finetune(
            model,
            good_batches(2),
            num_steps=2,
            config=CONFIG,
            output=tmp_path,
            callbacks=[Steps(1, stop_with(ZeroDivisionError()))],
        )


def test_the_user_s_own_run_stays_open(model, tmp_path, caplog):
    with mezo.attach(model, CONFIG) as run:
        run.step(good_batches(1)[0])
        steps = Steps(2, interrupt)
        trainer = mezo.MeZOTrainer(run, good_batches(4), num_steps=4, callbacks=[steps])
        with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert (trainer.summary.steps, run.steps) == (2, 3)
        assert "after 2 of 4 steps; run 'mezo' is open" in caplog.text
        assert "stopped by KeyboardInterrupt" in trainer.summary.problems[0]
        run.step(good_batches(1)[0])
        run.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("function", ["perturb_into", "add_directions_"])
def test_an_interrupt_behind_a_kernel_does_not_apply_an_update_twice(
    model, monkeypatch, function, tmp_path
):
    """Ctrl-C during a native call is delivered right behind it, before the next statement."""
    real = getattr(mezo.core.state, function)
    steps, calls = Steps(), []

    def then_interrupt(*args, **kwargs):
        real(*args, **kwargs)
        if len(steps.results) == 3 and not calls:
            calls.append(1)
            interrupt()

    monkeypatch.setattr(mezo.core.state, function, then_interrupt)

    def read_weights(progress):  # flushes, by add_directions_
        if function == "add_directions_":
            run.weights()

    with mezo.attach(model, CONFIG) as run:
        trainer = mezo.MeZOTrainer(
            run, good_batches(5), num_steps=5, callbacks=[steps, read_weights]
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert calls
        check_replay(steps.results, run.weights(), CONFIG.seed)


def test_a_step_that_was_taken_but_interrupted_is_counted_and_seen(model, tmp_path, monkeypatch):
    from mezo.engines.transformers import TransformersSession

    seen, real = [], TransformersSession.step

    def step(session, request):
        reply = real(session, request)
        if request.step == 2:
            raise KeyboardInterrupt
        return reply

    monkeypatch.setattr(TransformersSession, "step", step)
    with pytest.raises(KeyboardInterrupt) as caught:
        mezo.finetune(
            model,
            good_batches(6),
            num_steps=6,
            config=CONFIG,
            output=tmp_path / "out",
            callbacks=[seen.append],
        )
    partial = caught.value.partial_training
    assert partial.summary.steps == 3
    assert sum(partial.summary.statuses.values()) == 3
    results = [p.result for p in seen if p.result is not None]
    assert [r.step for r in results] == [0, 1, 2]
    check_replay(results, saved_weights(tmp_path / "out"), CONFIG.seed)
