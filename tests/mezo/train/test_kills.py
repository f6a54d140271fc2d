"""A training that is killed, as often as one likes, and gone on with is the training itself."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.support.kills import FAULTS, POINTS, left_by, train_in_a_child


@pytest.fixture(scope="module")
def trainings(tiny_model_dir, tmp_path_factory):
    """A function that gives a training's options, and what it leaves without any kill."""
    folder = tmp_path_factory.mktemp("kills")
    rng = random.Random(1)
    rows = [
        f"{' '.join(f'w{rng.randrange(5, 90)}' for _ in range(rng.randint(3, 8)))},{label}"
        for i in range(40)
        for label in [("bad", "good")[i % 2]]
    ]
    data = folder / "own.csv"
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    shared = {
        "model": tiny_model_dir("llama"),
        "data": str(data),
        "engine": "transformers",
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "lora_r": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "seed": 3,
        "eval_steps": 3,
        "save_steps": 2,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "resume_from_checkpoint": "auto",
    }
    whole = {**shared, "output_dir": str(folder / "whole")}
    assert train_in_a_child(whole) == 0
    return shared, left_by(folder / "whole")


def check_kills(trainings, output, rng, *, count):
    """Kill a training ``count`` times, go on each time, and compare with the whole one."""
    shared, expected = trainings
    options = {**shared, "output_dir": str(output)}
    kills = 0
    while True:
        kill = None
        if kills < count:
            kill = (rng.choice(POINTS), rng.randint(1, 12), rng.random() < 0.5)
        code = train_in_a_child(options, kill)
        assert code in (0, -9), (kill, code)
        kills += code == -9
        if code == 0 and kill is None:
            break
        if code == 0:  # the training was over before that call; another one begins
            assert left_by(output) == expected, kill
            shutil.rmtree(output)
    found = left_by(output)
    assert found == expected
    return kills


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [1, 4])
def test_killed_at_a_point(trainings, tmp_path, point, number):
    shared, expected = trainings
    options = {**shared, "output_dir": str(tmp_path / "out")}
    assert train_in_a_child(options, (point, number, number > 1)) == -9
    assert train_in_a_child(options) == 0
    assert left_by(tmp_path / "out") == expected


@pytest.mark.parametrize("seed", range(4))
def test_killed_several_times(trainings, tmp_path, seed):
    assert check_kills(trainings, tmp_path / "out", random.Random(seed), count=3) == 3


def check_fault(trainings, output, call, number):
    """Let one call of the system fail; returns whether there was such a call."""
    shared, expected = trainings
    options = {**shared, "output_dir": str(output)}
    code = train_in_a_child(options, (call, number, True))
    assert code in (0, 1), code
    assert train_in_a_child(options) == 0
    assert left_by(output) == expected, (call, number)
    return code == 1


@pytest.mark.parametrize(("call", "number"), [("write", 4), ("fsync", 5), ("replace", 4)])
def test_a_disk_that_fails_once_ends_a_training_that_goes_on(trainings, tmp_path, call, number):
    assert check_fault(trainings, tmp_path / "out", call, number)


@pytest.mark.proof
@pytest.mark.parametrize("call", FAULTS)
def test_every_call_of_the_system_fails_once(trainings, tmp_path, call):
    number, failed = 1, 0
    quiet = 0  # calls whose failure the training survives, or that it does not make
    while quiet < 4:
        is_failure = check_fault(trainings, tmp_path / f"out-{number}", call, number)
        failed, quiet = failed + is_failure, 0 if is_failure else quiet + 1
        number += 1
    assert failed > 0


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(60))
def test_killed_300_times(trainings, tmp_path, seed):
    assert check_kills(trainings, tmp_path / "out", random.Random(100 + seed), count=5) == 5
