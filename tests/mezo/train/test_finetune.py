"""`mezo.finetune`: what counts as rows, and what as batches."""

from __future__ import annotations

import random
import types

import pandas as pd
import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import mezo
from mezo.cli import app
from mezo.train.finetune import is_data, rows_of
from tests.support.files import saved_weights, valid_json
from tests.support.tiny import random_batch


@pytest.fixture
def tuned(options, tmp_path):
    """Fine-tune on something; returns (summary.json, the adapter's weights)."""
    model = options.pop("model_name_or_path")
    del options["dataset_name"]

    def run(data, **more):
        output = tmp_path / "out"
        mezo.finetune(model, data, **{**options, **more})
        return valid_json((output / "summary.json").read_text()), saved_weights(output / "adapter")

    return run


@pytest.mark.parametrize(
    "kind",
    [pd.DataFrame, iter, tuple, lambda rows: dict(enumerate(rows)).values()],
    ids=["DataFrame", "iterator", "tuple", "view"],
)
def test_rows_of_all_kinds_are_one_training(tuned, rows, kind):
    _, first = tuned(rows)
    _, again = tuned(kind(rows))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", [list, pd.DataFrame, iter])
def test_examples_to_evaluate_on_may_be_in_memory(tuned, rows, kind, tmp_path):
    summary, _ = tuned(rows[:32], eval_data=kind(rows[32:37]))
    assert summary["held_out"]["after"]["num_examples"] == 5
    assert summary["train_examples"] == 32
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its rows were in memory and stand in no file (data, eval_data)." in " ".join(
        card.split()
    )
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert not {"data", "eval_data"} & set(recipe)
    assert recipe["num_steps"] == 6


def test_the_settings_of_rows_in_memory_need_data_again(tuned, rows, data, tmp_path):
    tuned(rows)
    words = ["train", "--config", str(tmp_path / "out" / "run.yaml"), "--output"]
    result = CliRunner().invoke(app, [*words, str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "got the settings of a training on rows in memory; pass data" in result.output
    result = CliRunner().invoke(app, [*words, str(tmp_path / "other"), "--data", str(data)])
    assert result.exit_code == 0, result.output


def test_batches_stay_what_they_are():
    batches = [random_batch(random.Random(0)) for _ in range(3)]
    assert rows_of(batches) is batches
    endless = rows_of(batch for _ in iter(int, 1) for batch in batches)
    assert [next(endless) for _ in range(4)] == [*batches, batches[0]]
    loader = DataLoader(batches, batch_size=None, shuffle=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert rows_of(loader) is loader
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(map(is_data, (batches, endless, loader)))
    assert is_data(types.SimpleNamespace(column_names=["text"]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a", "b"], r"data must be rows as dicts, or batches, got \['a', 'b'\]; pass dicts as"),
        ([], r"data must be rows as dicts, or batches, got \[\]"),
        ([{"text": "a"}, "b"], "data must be dicts throughout, got other rows between them"),
    ],
)
def test_other_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        mezo.finetune("model", data, output_dir="out")


@pytest.mark.parametrize("data", [5, iter([3])])
def test_other_examples_to_evaluate_on_are_refused(data, rows):
    with pytest.raises(ValueError, match="eval_data must be a file, a folder, a data set"):
        mezo.finetune("model", rows, output_dir="out", eval_data=data)
