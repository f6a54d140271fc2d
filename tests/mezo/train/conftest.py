"""A short training on own rows, for tests of what options change."""

from __future__ import annotations

import csv
import random

import pytest
from typer.testing import CliRunner

from mezo.cli import app
from tests.support.files import logged, valid_json
from tests.support.tiny import VOCAB

ROWS = 40


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(0)
    return [
        {
            "text": " ".join(f"w{rng.randrange(5, VOCAB)}" for _ in range(rng.randint(3, 8))),
            "label": ("bad", "good")[i % 2],
        }
        for i in range(ROWS)
    ]


@pytest.fixture
def data(rows, tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def options(tiny_model_dir, data, tmp_path):
    """Options of a short training on own data, in Python."""
    return {
        "model_name_or_path": tiny_model_dir("llama"),
        "dataset_name": str(data),
        "engine": "transformers",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "lora_r": 2,
        "learning_rate": 1e-3,
        "seed": 3,
        "overwrite_output_dir": True,
    }


@pytest.fixture
def trained(options, tmp_path):
    """Train with further options; returns (summary.json, the steps' log, output)."""

    def run(**more):
        values = {**options, **more}
        words = [w for k, v in values.items() if v is not None for w in (f"--{k}", str(v))]
        result = CliRunner().invoke(app, ["train", *words])
        assert result.exit_code == 0, result.output
        output = tmp_path / "out"
        run.output = result.output
        return valid_json((output / "summary.json").read_text()), logged(output), output

    return run
