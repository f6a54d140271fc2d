"""Trainings in the real engine that are killed, gone on with, and equal to the whole one."""

from __future__ import annotations

import random

import pytest
import torch

from mezo.checkpoint.replayed import weights_at
from mezo.checkpoint.trajectory import read
from mezo.checkpoint.verify import verify
from tests.support.files import saved_weights
from tests.support.kills import SCHEDULER, left_by, train_in_a_child

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture(scope="module")
def options(tiny_model_dir, tmp_path_factory):
    """Options of a training in SGLang, but for its output."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(1)
    texts = [" ".join(f"w{rng.randrange(5, 90)}" for _ in range(6)) for _ in range(40)]
    rows = [f"{text},{('bad', 'good')[i % 2]}" for i, text in enumerate(texts)]
    (folder / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return {
        "model": tiny_model_dir("llama"),
        "data": str(folder / "own.csv"),
        "engine": "sglang",
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "lora_r": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "seed": 3,
        "eval_steps": 4,
        "save_steps": 4,
        "resume_from_checkpoint": "auto",
    }


def test_killed_four_times(options, tmp_path):
    whole = tmp_path / "whole"
    assert train_in_a_child({**options, "output_dir": str(whole)}) == 0
    expected = left_by(whole)
    cut = {**options, "output_dir": str(tmp_path / "cut")}
    assert train_in_a_child(cut, ("append", 2, False)) == -9
    # The engine dies, not the training: it is saved by replay, and an error.
    assert train_in_a_child(cut, (SCHEDULER, 5, True)) == 1
    saved = saved_weights(tmp_path / "cut" / "adapter")
    trajectory = read(tmp_path / "cut" / "trajectory.mezo")
    assert len(trajectory.records) >= 5
    replayed = weights_at(trajectory)
    assert all(torch.equal(saved[name], value) for name, value in replayed.items())
    assert train_in_a_child(cut, ("half append", 3, True)) == -9
    assert train_in_a_child(cut, ("snapshot", 2, True)) == -9
    assert train_in_a_child(cut) == 0
    assert left_by(tmp_path / "cut") == expected
    assert all(check.is_ok for check in verify(tmp_path / "cut"))


@pytest.mark.proof
def test_from_one_rank_to_two(options, tmp_path):
    """Losses of two ranks differ by rounding; theta does not, for the same coefficients."""
    one = {**options, "output_dir": str(tmp_path / "one")}
    assert train_in_a_child(one, ("append", 6, False)) == -9
    two = {
        **options,
        "output_dir": str(tmp_path / "two"),
        "resume_from_checkpoint": str(tmp_path / "one"),
        "engine_args": {"tp_size": 2},
    }
    assert train_in_a_child(two) == 0
    first, second = (read(tmp_path / name / "trajectory.mezo") for name in ("one", "two"))
    assert list(second.records[:6]) == list(first.records)
    assert len(second.records) == 12
    assert all(check.is_ok for check in verify(tmp_path / "two"))
