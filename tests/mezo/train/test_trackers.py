"""`report_to`: TensorBoard, Weights & Biases and trackio get steps and evaluations."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
import types

import pytest
import transformers
from typer.testing import CliRunner

from mezo.cli import app


def board_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.*")
    board = EventAccumulator(str(events))
    board.Reload()
    return board


def pair_mean(steps, step):
    """The mean of the two losses that a record behind ``step`` is of."""
    return (steps[step - 2].loss + steps[step - 1].loss) / 2


def refused(options, tracker):
    """What `mezo train` says, before it starts an engine."""
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    result = CliRunner().invoke(app, ["train", *words, "--report_to", tracker])
    assert result.exit_code == 2
    assert "Starting the" not in result.output
    return " ".join(result.output.split())


def test_tensorboard_gets_steps_and_evaluations(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    summary, steps, _ = trained(report_to="tensorboard", logging_steps=2, eval_steps=3)
    board = board_in(tmp_path / "board")
    tags = board.Tags()["scalars"]
    assert {"train/loss", "train/projected_grad", "eval/loss", "eval/accuracy"} <= set(tags)
    found = [(e.step, e.value) for e in board.Scalars("train/loss")]
    expected = [(s, pair_mean(steps, s)) for s in (2, 4, 6)]
    assert found == [(s, pytest.approx(x)) for s, x in expected]
    assert len(board.Scalars("eval/loss")) == len(summary["evaluations"])


@pytest.mark.parametrize(("run_name", "seen"), [(None, "out"), ("mine", "mine")])
def test_a_tracker_sees_the_run_s_name_and_schedule(trained, monkeypatch, tmp_path, run_name, seen):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trained(report_to="tensorboard", run_name=run_name, lr_scheduler_type="cosine", warmup_steps=2)
    (text,) = board_in(tmp_path / "board").Tensors("args/text_summary")
    found = json.loads(text.tensor_proto.string_val[0])
    assert found["run_name"] == seen
    assert (found["lr_scheduler_type"], found["warmup_steps"]) == ("cosine", 2)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_sentence(options, tracker):
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed")
    said = refused(options, tracker)
    assert f"report_to must name trackers that are installed, got ['{tracker}']" in said
    assert f"run pip install {tracker}." in said


def test_wandb_without_a_login_is_one_sentence(options, monkeypatch):
    def login():
        raise RuntimeError("No API key\nconfigured.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    monkeypatch.setattr(
        "transformers.integrations.get_reporting_integration_callbacks",
        lambda names: [transformers.TrainerCallback],
    )
    said = refused(options, "wandb")
    assert "report_to wandb must have a login, got RuntimeError: No API key configured; run" in said
    assert "run wandb login, or set WANDB_MODE=offline." in said


def test_wandb_gets_steps_and_evaluations(trained, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    seen, real = [], wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda run, data, *args, **kwargs: seen.append(data) or real(run, data, *args, **kwargs),
    )
    try:
        _, steps, _ = trained(report_to="wandb", run_name="mine", logging_steps=2, eval_steps=3)
        assert wandb.run.name == "mine"
    finally:
        wandb.finish()
    losses = [(x["train/global_step"], x["train/loss"]) for x in seen if "train/loss" in x]
    assert losses == [(s, pytest.approx(pair_mean(steps, s))) for s in (2, 4, 6)]
    assert [x["train/global_step"] for x in seen if "eval/loss" in x] == [0, 3, 6]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_trackio_gets_steps_and_evaluations(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    _, steps, _ = trained(report_to="trackio", run_name="mine", logging_steps=2, eval_steps=3)
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as db:
        found = db.execute("select run_name, metrics from metrics order by step").fetchall()
    assert {name for name, _ in found} == {"mine"}
    records = [json.loads(metrics) for _, metrics in found]
    losses = [(x["train/global_step"], x["train/loss"]) for x in records if "train/loss" in x]
    assert losses == [(s, pytest.approx(pair_mean(steps, s))) for s in (2, 4, 6)]
    assert [x["train/global_step"] for x in records if "eval/loss" in x] == [0, 3, 6]
