"""Hugging Face's callbacks are told what `Trainer` tells them."""

from __future__ import annotations

import random

import pytest
import transformers

import mezo
from mezo.train.callbacks import Progress
from mezo.train.logs import finite_mean
from mezo.train.trainer import MeZOTrainer
from mezo.train.trainer_callbacks import TrainerCallbacks
from tests.support.tiny import load_model, random_batch

EVENTS = (
    *("on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log"),
    *("on_evaluate", "on_save", "on_epoch_end", "on_train_end"),
)


class Notes(transformers.TrainerCallback):
    """Remembers events with their steps; all instances share a list."""

    seen: list = []  # noqa: RUF012

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)

        def note(args, state, control, **more):
            Notes.seen.append((name, state.global_step))
            Notes.args, Notes.state = args, state

        return note


@pytest.fixture
def tune(options, rows, monkeypatch):
    monkeypatch.setattr(Notes, "seen", [])
    model = options.pop("model_name_or_path")
    del options["dataset_name"]

    def run(*callbacks, **more):
        return mezo.finetune(model, rows, callbacks=callbacks, **{**options, **more})

    return run


def test_events_come_in_trainer_s_order(tune):
    tune(Notes, max_steps=10, logging_steps=4, save_steps=5)  # 8 steps in an epoch
    names = [name for name, _ in Notes.seen]
    assert names[:2] == ["on_init_end", "on_train_begin"]
    per_step = [event for event in Notes.seen if event[0] in ("on_step_begin", "on_step_end")]
    assert per_step == [
        e for i in range(10) for e in (("on_step_begin", i), ("on_step_end", i + 1))
    ]
    rest = [e for e in Notes.seen if e[0] not in ("on_step_begin", "on_step_end")][2:]
    assert rest == [
        *[("on_log", 0), ("on_evaluate", 0), ("on_epoch_begin", 0), ("on_log", 4), ("on_save", 5)],
        *[("on_log", 8), ("on_epoch_end", 8), ("on_epoch_begin", 8), ("on_log", 10)],
        *[("on_log", 10), ("on_evaluate", 10), ("on_save", 10), ("on_epoch_end", 10)],
        ("on_train_end", 10),
    ]


def test_arguments_and_state_are_the_training_s(tune, tmp_path):
    summary = tune(
        Notes(), eval_steps=2, save_steps=2, load_best_model_at_end=True, logging_steps=3
    )
    args, state = Notes.args, Notes.state
    assert (args.learning_rate, args.max_steps, args.logging_steps) == (1e-3, 6, 3)
    assert (args.output_dir, args.per_device_train_batch_size) == (str(tmp_path / "out"), 4)
    assert (args.eval_strategy, args.eval_steps, args.save_steps, args.seed) == ("steps", 2, 2, 3)
    assert (args.load_best_model_at_end, args.metric_for_best_model) == (True, "loss")
    assert args.greater_is_better is False
    losses = {x["step"]: x["eval_loss"] for x in state.log_history if "eval_loss" in x}
    assert sorted(losses) == [0, 2, 4, 6]
    assert state.best_metric == min(losses.values())
    assert losses[state.best_global_step] == state.best_metric
    if state.best_global_step:
        path = tmp_path / "out" / f"checkpoint-{state.best_global_step}"
        assert state.best_model_checkpoint == str(path)
    assert summary.problems == ()


@pytest.mark.parametrize("own", [{}, {"metric_for_best_model": "accuracy", "patience": 50}])
def test_early_stopping_stops(tune, monkeypatch, own):
    values = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9])
    sign = -1.0 if own else 1.0

    def record(evaluation):
        value = next(values)
        return {"eval_loss": value, "eval_accuracy": sign * value}

    monkeypatch.setattr("mezo.train.trainer_callbacks.evaluation_record", record)
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    summary = tune(stopping, Notes(), max_steps=30, eval_steps=2, **own)
    assert (summary.steps, summary.problems) == (6, ())
    assert Notes.state.best_metric == sign * 2.0


@pytest.mark.parametrize("kind", [False, True])
def test_early_stopping_without_evaluations_is_one_sentence(tune, tiny_model_dir, kind):
    callback = transformers.EarlyStoppingCallback if kind else transformers.EarlyStoppingCallback(2)
    message = "EarlyStoppingCallback must come with evaluations during the training, got none; give"
    with pytest.raises(ValueError, match=message):
        tune(callback)
    config = mezo.MeZOConfig(rank=2)
    batches = [random_batch(random.Random(0))]
    from tests.support.tiny import make_tokenizer

    model = load_model(tiny_model_dir("llama"))
    with (
        mezo.attach(model, config, tokenizer=make_tokenizer(), selftest=False) as run,
        pytest.raises(ValueError, match=message),
    ):
        MeZOTrainer(run, batches, num_steps=1, callbacks=[callback])


def test_a_logged_loss_is_the_mean_of_its_window(tune):
    results = []
    tune(Notes(), lambda p: results.append(p.result), logging_steps=4)
    losses = [result.loss for result in results if result is not None]
    logged = [(x["step"], x["loss"]) for x in Notes.state.log_history if "loss" in x]
    assert logged == [
        (4, pytest.approx(sum(losses[:4]) / 4)),
        (6, pytest.approx(sum(losses[4:]) / 2)),
    ]
    assert finite_mean([1.0, float("nan"), 2.0, float("inf")]) == 1.5
    assert finite_mean([float("nan")]) != finite_mean([float("nan")])


def test_a_callback_may_ask_for_a_log():
    class Asks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            control.should_log = state.global_step == 3

    callbacks = TrainerCallbacks([Asks], {"logging_steps": 5})
    callbacks.begin(6)
    result = mezo.results.StepResult
    fields = {
        **dict.fromkeys(("loss_plus", "loss_minus"), 1.0),
        **dict.fromkeys(("tokens", "prompt_tokens", "reused_tokens", "forwards"), 1),
        **{"losses": ((1.0, 1.0),), "projected_grads": (0.0,), "coefficients": (0.0,)},
        **{"signal_to_noise": (None,), "status": mezo.results.StepStatus.OK},
        "timings": {"total": 1.0},
    }
    for step in range(1, 7):
        callbacks.step_begins(step - 1, None)
        callbacks(Progress(step, 6, 0.0, result=result(step=step - 1, loss=float(step), **fields)))
    logged = [(x["step"], x["loss"]) for x in callbacks.state.log_history]
    assert logged == [(3, 2.0), (5, 4.5), (6, 6.0)]
