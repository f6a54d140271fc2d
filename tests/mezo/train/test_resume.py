"""Going on with a training: in its place, from an earlier step, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from typer.testing import CliRunner

import mezo
from mezo.checkpoint.replayed import weights_at
from mezo.checkpoint.trajectory import read
from mezo.checkpoint.trajectory_writer import TrajectoryWriter
from mezo.cli import app
from tests.support.files import saved_weights, valid_json
from tests.support.kills import left_by


class StopError(Exception):
    """Ends a training in the middle."""


def stop_behind(step: int):
    def callback(progress: mezo.train.callbacks.Progress) -> None:
        if progress.result is not None and progress.step == step:
            raise StopError

    return callback


@pytest.fixture
def train(options, tmp_path):
    """Train in Python; returns the output. ``stop``: the step behind which something raises."""
    shared = {**options, "eval_steps": 2, "save_steps": 3, "learning_rate": 1e-2}
    del shared["overwrite_output_dir"]

    def run(output="out", *, stop=None, **more):
        values = {**shared, **more, "output_dir": str(tmp_path / output)}
        model, data = values.pop("model_name_or_path"), values.pop("dataset_name")
        callbacks = [] if stop is None else [stop_behind(stop)]
        if stop is None:
            mezo.finetune(model, data, callbacks=callbacks, **values)
        else:
            with pytest.raises(StopError):
                mezo.finetune(model, data, callbacks=callbacks, **values)
        return tmp_path / output

    return run


def test_auto_begins_goes_on_and_is_done(train):
    expected = left_by(train("whole", load_best_model_at_end=True))
    more = {"resume_from_checkpoint": "auto", "load_best_model_at_end": True}
    train(stop=2, **more)
    assert len(read(train(stop=5, **more) / "trajectory.mezo").records) == 5
    assert left_by(train(**more)) == expected
    assert left_by(train(**more)) == expected  # there is nothing left to do


def test_a_directory_alone_says_how_to_go_on(train, tmp_path):
    expected = left_by(train("whole"))
    output = train(stop=3)
    result = CliRunner().invoke(app, ["train", "--resume_from_checkpoint", str(output)])
    assert result.exit_code == 0, result.output
    assert f"Going on with {output} behind step 3." in result.output
    assert left_by(output) == expected


def test_a_branch_from_an_earlier_step(train):
    whole = train("whole")
    branch = train("branch", resume_from_checkpoint=str(whole), at=2)
    assert left_by(branch) == left_by(whole)
    header = read(branch / "trajectory.mezo").header
    assert header.branch == {"of": str(whole), "at": 2}
    other = train(
        "other",
        resume_from_checkpoint=str(whole),
        at=2,
        learning_rate=1e-3,
        allow_change=True,
    )
    first, second = (read(path / "trajectory.mezo").records for path in (whole, other))
    assert list(first[:2]) == list(second[:2])
    assert first[2].losses == second[2].losses  # of the same weights
    assert second[2].coefficients[0] == pytest.approx(0.1 * first[2].coefficients[0])


def test_the_early_stop_remembers_its_waiting(train, monkeypatch):
    """Evaluations that were are not taken again, and still count."""
    more = {"patience": 2, "max_steps": 6, "eval_steps": 1, "learning_rate": 0.0}
    whole = train("whole", **more)  # no step changes anything: it stops behind two evaluations
    steps = valid_json((whole / "summary.json").read_text())["steps"]
    assert steps < 6
    train(stop=1, resume_from_checkpoint="auto", **more)
    assert left_by(train(resume_from_checkpoint="auto", **more)) == left_by(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, r"must have the settings of .* got seed 4 instead of 3; leave them out"),
        ({"lora_r": 3, "seed": 4}, r"got rank 3 instead of 2; seed 4 instead of 3"),
        ({"learning_rate": 1e-3}, r"got lr 0.001 instead of 0.01; .* allow_change"),
        ({"max_steps": 9}, r"got num_steps 9 instead of 6; .* allow_change"),
    ],
)
def test_other_settings_are_listed(train, changed, message):
    train(stop=2)
    with pytest.raises(ValueError, match=message):
        train(**changed, resume_from_checkpoint="auto")


def test_settings_that_steps_do_not_depend_on_may_change(train):
    expected = left_by(train("whole", eval_steps=3))
    train(stop=2)
    found = left_by(train(resume_from_checkpoint="auto", eval_steps=3, logging_steps=1))
    assert found["records"] == expected["records"]


def test_other_data_and_another_model_are_refused(train, data, options, tmp_path, tiny_model_dir):
    train(stop=2)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=r"the data must be that of .* \(rows_sha256 differ\)"):
        train(resume_from_checkpoint="auto")
    train(resume_from_checkpoint="auto", allow_change=True, stop=3)
    other = tmp_path / "model"
    shutil.copytree(options["model_name_or_path"], other)
    config = other / "config.json"
    config.write_text(config.read_text().replace("\n", "\n ", 1))
    with pytest.raises(ValueError, match=r"the model must be that of .* \(config_sha256 differ\)"):
        train(resume_from_checkpoint="auto", model_name_or_path=str(other))


def test_an_output_with_a_training_is_not_overwritten(train):
    output = train()
    before = left_by(output)
    with pytest.raises(ValueError, match=r"must not have a training already.*overwrite_output_dir"):
        train(seed=5)
    assert left_by(output) == before
    assert (output / "checkpoint-6").exists()
    train(seed=5, save_steps=4, overwrite_output_dir=True)
    assert not (output / "checkpoint-6").exists()
    assert read(output / "trajectory.mezo").header.seed == 5


def test_an_overwriting_that_does_not_begin_loses_nothing(train):
    output = train()
    before = left_by(output)
    with pytest.raises(ValueError, match="there must be a batch of 4 training examples, got 0"):
        train(overwrite_output_dir=True, max_prompt_tokens=1)
    with (
        TrajectoryWriter.append_to(output / "trajectory.mezo"),
        pytest.raises(ValueError, match="must have one writer, got a second one"),
    ):
        train(overwrite_output_dir=True)
    assert left_by(output) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"at": 1}, "at must come with resume_from_checkpoint, a run's directory, got None"),
        ({"at": 1, "resume_from_checkpoint": "auto"}, "at must come with .* got 'auto'"),
        ({"resume_from_checkpoint": "nowhere"}, "must be auto or a run's directory with traj"),
        (
            {"resume_from_checkpoint": "auto", "overwrite_output_dir": True},
            "overwrite_output_dir must come without resume_from_checkpoint",
        ),
    ],
)
def test_what_there_is_to_go_on_from(train, more, message):
    with pytest.raises(ValueError, match=message):
        train(**more)


def test_steps_that_are_not_there_or_would_be_lost(train):
    output = train()
    with pytest.raises(ValueError, match=r"at must be at most the 6 steps of .* got 7"):
        train("other", resume_from_checkpoint=str(output), at=7)
    with pytest.raises(ValueError, match="at 3 must come with another output directory"):
        train(resume_from_checkpoint=str(output), at=3)


def test_too_many_skipped_steps_end_a_training_and_an_earlier_step_saves_it(train, tmp_path):
    more = {"learning_rate": 1e25, "max_steps": 8}
    with pytest.raises(mezo.NonfiniteLossError, match=r"at most 3 steps in a row .* got step 3"):
        train(max_skipped_steps=3, **more)
    output = tmp_path / "out"
    records = read(output / "trajectory.mezo").records
    assert [bool(record.coefficients) for record in records] == [True, False, False, False]
    assert all(value.isfinite().all() for value in saved_weights(output / "adapter").values())
    saved = train(
        "saved",
        resume_from_checkpoint=str(output),
        at=0,
        max_steps=8,
        allow_change=True,
        max_skipped_steps=3,
    )
    assert valid_json((saved / "summary.json").read_text())["statuses"] == {"OK": 8}


def test_replay_and_verify(train, tmp_path, tiny_model_dir):
    output = train()
    for backend, where in (("reference", output / "replayed-3"), ("cpu", tmp_path / "elsewhere")):
        words = ["replay", str(output), "--at", "3", "--backend", backend]
        words += [] if backend == "reference" else ["--output", str(where)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        replayed, saved = (saved_weights(path) for path in (where, output / "checkpoint-3"))
        assert all(torch.equal(replayed[name], saved[name]) for name in saved)
    other = tiny_model_dir("qwen2")
    result = CliRunner().invoke(app, ["verify", str(output), "--model", other])
    assert result.exit_code == 1
    assert f"BAD  model: {other}: config_sha256, index_sha256 differ" in result.output
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        both = [(output / folder / name).read_bytes() for folder in ("replayed-3", "checkpoint-3")]
        assert both[0] == both[1]
    result = CliRunner().invoke(app, ["verify", str(output)])
    assert result.exit_code == 0, result.output
    assert "ok   adapter: step 6, replayed bit for bit" in result.output
    assert "ok   checkpoint-3: step 3, replayed bit for bit" in result.output
    weights = output / "checkpoint-3" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = CliRunner().invoke(app, ["verify", str(output)])
    assert result.exit_code == 1
    assert "BAD  checkpoint-3: 1 of" in result.output
    trajectory = output / "trajectory.mezo"
    content = bytearray(trajectory.read_bytes())
    content[-40] ^= 1
    trajectory.write_bytes(content)
    result = CliRunner().invoke(app, ["verify", str(output)])
    assert result.exit_code == 2
    assert "a wrong record" in result.output


def test_replay_beyond_the_end_and_of_no_run(train, tmp_path):
    output = train(stop=2)
    result = CliRunner().invoke(app, ["replay", str(output), "--at", "9"])
    assert result.exit_code == 2
    assert "at must be between 0 and the 2 steps" in result.output
    assert CliRunner().invoke(app, ["replay", str(tmp_path)]).exit_code == 2


def test_what_an_exception_leaves_is_the_replayed_adapter(train):
    output = train(stop=4)
    weights = weights_at(read(output / "trajectory.mezo"))
    saved = saved_weights(output / "adapter")
    assert all(torch.equal(saved[name], value) for name, value in weights.items())
