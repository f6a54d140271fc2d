"""What the user's `compute_metrics` returns is written, whatever kind of number it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mezo
from mezo.train.user_metrics import as_numbers
from tests.support.files import valid_json


def test_numbers_of_all_kinds_reach_the_summary(options, tmp_path):
    returned = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": torch.tensor(0.25),
        "d": np.array(2.0),
        "e": np.bool_(True),
        "eval_f": 1,
    }
    summary = mezo.finetune(
        options.pop("model_name_or_path"),
        options.pop("dataset_name"),
        compute_metrics=lambda prediction: returned,
        **options,
    )
    assert summary.problems == ()
    expected = {"a": 0.5, "b": 3, "c": 0.25, "d": 2.0, "e": 1, "f": 1}
    after = valid_json((tmp_path / "out" / "summary.json").read_text())["held_out"]["after"]
    results = valid_json((tmp_path / "out" / "all_results.json").read_text())
    for name, value in expected.items():
        assert after[name] == value
        assert results[f"eval_{name}"] == value


def test_nothing_is_no_metric():
    assert as_numbers(lambda _: None)("anything") == {}
    assert as_numbers(lambda p: {"x": p})(2.0) == {"x": 2.0}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, "compute_metrics must return names and numbers, got 0.5; return a dict"),
        ({"f1": "high"}, "names and numbers, got 'high' for 'f1'; return a float"),
        ({"f1": np.zeros(2)}, r"got ndarray of shape \(2,\) for 'f1'; return a float"),
    ],
)
def test_anything_else_is_one_sentence(returned, message):
    with pytest.raises(ValueError, match=message):
        as_numbers(lambda _: returned)("anything")
