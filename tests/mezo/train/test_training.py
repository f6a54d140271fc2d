"""`mezo train`: its files and its exit status, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mezo import tasks
from mezo.cli import app
from mezo.tasks import rotten_tomatoes
from mezo.train.trainer import MeZOTrainer
from tests.support.files import logged, saved_weights, valid_json, write_reviews
from tests.support.independent import check_replay
from tests.support.interrupts import check_interrupted
from tests.support.source import ROOT


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture
def arguments(tiny_model_dir, reviews, tmp_path):
    """Arguments of a short training, as a list; later ones win."""

    def make(*more: object, output: Path = tmp_path / "out", data: Path = reviews) -> list[str]:
        fixed = "train --task rotten_tomatoes --engine transformers "
        fixed += f"--model {tiny_model_dir('llama')} --data {data} "
        fixed += f"--output {output} --steps 6 --batch-size 4 --eval-examples 8 --rank 2 --lr 1e-4"
        return [*fixed.split(), *map(str, more)]

    return make


def test_without_matplotlib_there_is_no_plot_and_no_failure(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, arguments())
    assert result.exit_code == 0, result.output
    first, *rest = result.output.splitlines()
    assert first.startswith("There will be no loss.png: run pip install 'mezo-sglang[plots]'")
    assert rest[-1].endswith("out/adapter, summary.json and steps.jsonl.")
    output = tmp_path / "out"
    assert not (output / "loss.png").exists()
    assert valid_json((output / "summary.json").read_text())["problems"] == []
    check_replay(logged(output), saved_weights(output / "adapter"), 0)


@pytest.mark.parametrize("where", ["out", "out/adapter", "out/summary.json", "out/steps.jsonl"])
def test_an_output_in_the_way_is_refused_before_the_engine(arguments, tmp_path, where):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    if where.endswith("json") or where.endswith("jsonl"):
        path.mkdir()
    else:
        path.touch()
    result = CliRunner().invoke(app, arguments())
    assert result.exit_code == 2
    assert "error: output:" in result.output
    assert "Starting the" not in result.output


def test_an_example_that_is_too_long_is_refused_before_the_first_step(arguments, tmp_path):
    data = write_reviews(tmp_path / "long.csv", long_text=" ".join(["w7"] * 280))
    result = CliRunner().invoke(app, arguments("--steps", 400, data=data))
    assert result.exit_code == 2
    assert "every example must fit the engine, got Batch: row" in result.output
    assert "set max_length or max_prompt_tokens" in result.output
    assert "held out" not in result.output
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_task_s_long_prompts_lose_their_beginning(arguments, tmp_path):
    data = write_reviews(tmp_path / "long.csv", long_text=" ".join(["w7"] * 280))
    result = CliRunner().invoke(app, arguments("--max_length", 9, data=data))
    assert result.exit_code == 0, result.output
    cut = [record.tokens for record in logged(tmp_path / "out")]
    assert max(cut) <= 2 * 4 * (9 + 2)  # both signs of four rows, with their second option


def test_a_full_disk_ends_the_log_and_the_plot_and_not_the_training(arguments, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("steps.jsonl", "loss.png"):
        (output / name).symlink_to("/dev/full")
    result = CliRunner().invoke(app, arguments())
    assert result.exit_code == 1  # something of what was asked for is missing
    summary = valid_json((output / "summary.json").read_text())
    assert (summary["steps"], summary["completed"]) == (6, True)
    log, plot = summary["problems"]
    assert log == "steps.jsonl ends at step 0: [Errno 28] No space left on device."
    assert plot.startswith("loss.png could not be written: OSError: [Errno 28]")
    assert f"Problem: {log}" in result.output
    assert any(
        v.abs().max() > 0 for k, v in saved_weights(output / "adapter").items() if "lora_B" in k
    )


def test_weights_whose_loss_is_nan_are_no_success(arguments, tmp_path):
    result = CliRunner().invoke(app, arguments("--lr", "1e25"))
    output = tmp_path / "out"
    assert result.exit_code == 1
    summary = valid_json((output / "summary.json").read_text())
    after = summary["held_out"]["after"]
    assert (after["accuracy"], after["cross_entropy"], after["num_nonfinite"]) == (None, None, 8)
    assert summary["held_out"]["before"]["accuracy"] is not None
    assert summary["statuses"] == {"OK": 1, "NONFINITE_LOSS": 5}
    assert any(p.startswith("5 of 6 steps were skipped") for p in summary["problems"])
    for problem in summary["problems"]:
        assert f"Problem: {problem}" in result.output
    assert "accuracy none (8 examples, 8 without a finite score)" in result.output
    assert [record.status for record in logged(output)] == ["OK"] + ["NONFINITE_LOSS"] * 5
    assert logged(output)[1].loss is None
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    check_replay(logged(output)[:1], saved_weights(output / "adapter"), 0)  # saved all the same
    assert not any("Rounding removed" in p for p in summary["problems"])


def test_a_training_that_fails_is_one_sentence_and_saved(arguments, tmp_path, monkeypatch):
    real, calls = MeZOTrainer.evaluate, []

    def fail_at_the_end(self, step, seconds):
        calls.append(step)
        if step:
            raise RuntimeError("out of memory")
        return real(self, step, seconds)

    monkeypatch.setattr(MeZOTrainer, "evaluate", fail_at_the_end)
    result = CliRunner().invoke(app, arguments())
    output = tmp_path / "out"
    assert calls == [0, 6]
    assert result.exit_code == 1
    assert (
        "error: training stopped after 6 of 6 steps (RuntimeError: out of memory); their weights "
    )
    assert f"are in {output}/adapter." in result.output
    assert "Traceback" not in result.output
    summary = valid_json((output / "summary.json").read_text())
    assert (summary["completed"], summary["held_out"]["after"]) == (False, None)
    assert summary["problems"] == ["Training was stopped by RuntimeError after 6 of 6 steps."]
    check_replay(logged(output), saved_weights(output / "adapter"), 0)


def test_a_task_without_labels_that_score_is_reported(arguments, request):
    """Nothing of the report needs an accuracy."""

    def load(path):
        splits = rotten_tomatoes.load(path)
        return tasks.Splits(
            *(
                [
                    tasks.Example(e.prompt, completion=e.options[e.label], where=e.where)
                    for e in part
                ]
                for part in (splits.train, splits.dev, splits.test)
            )
        )

    task = tasks.Task("plain", load, " The movie was")
    tasks.TASKS.register("plain", task)
    request.addfinalizer(lambda: tasks.TASKS.unregister("plain"))
    result = CliRunner().invoke(app, arguments("--task", "plain"))
    assert result.exit_code == 0, result.output
    assert "accuracy none -> none" in result.output


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl_c", "term"]
)
def test_a_signal_saves_what_was_trained(arguments, tmp_path, number, status):
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "mezo", *arguments("--steps", 100000)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = output / "steps.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (log.exists() and log.read_text().count("\n") > 5):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == status, errors
    summary = check_interrupted(errors, output)
    assert summary["completed"] is False
    assert summary["held_out"]["after"] is None
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
