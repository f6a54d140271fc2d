"""MeZOConfig: every bad value is refused with one clear sentence."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import mezo


def test_defaults_and_normalisation():
    config = mezo.MeZOConfig(rank=4, alpha=8, target_modules=["q_proj"])
    assert config.target_modules == ("q_proj",)
    assert config.scaling == 2.0
    assert mezo.MeZOConfig(lr=0.0).lr == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0; the estimator divides by"),
        ({"eps": float("nan")}, "eps must be a finite number > 0, got nan"),
        ({"eps": -1e-3}, "eps must be a finite number > 0, got -0.001"),
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"rank": 2.5}, "rank must be an integer >= 1, got 2.5"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"seed": 2**64}, "seed must be an integer in"),
        ({"num_directions": 0}, "num_directions must be an integer in"),
        ({"distribution": "uniform"}, "distribution must be one of .* got 'uniform'"),
        ({"clip": 0.0}, "clip must be None or a finite number > 0, got 0.0"),
        ({"name": ""}, "name must be a non-empty string"),
        ({"name": "a/b"}, "name must be a non-empty string without '/', got 'a/b'"),
        ({"prefix": "shared"}, "prefix must be one of .* got 'shared'"),
        ({"target_modules": []}, "target_modules must be a non-empty list"),
        ({"target_modules": "q_proj"}, "target_modules must be a non-empty list"),
        ({"target_modules": ["q_proj", "q_proj"]}, "distinct module names"),
        ({"lr": "1e-3"}, "lr must be a finite number >= 0, got '1e-3'; pass a number, not text"),
        ({"lr": None}, "lr must be a finite number >= 0, got None"),
        ({"lr": True}, "lr must be a finite number >= 0, got True"),
        ({"lr": [1e-3]}, r"lr must be a finite number >= 0, got \[0.001\]"),
        ({"lr": 10**400}, "lr must be a finite number >= 0, got 1000"),
        ({"eps": np.array([1e-3])}, r"eps must be .* got ndarray of shape \(1,\)"),
        ({"alpha": "16"}, "alpha must be a finite number > 0, got '16'; pass a number, not text"),
        ({"clip": "3"}, "clip must be None or a finite number > 0, got '3'; pass a number"),
        ({"clip": float("nan")}, "clip must be None or a finite number > 0, got nan"),
        ({"rank": "8"}, "rank must be an integer >= 1, got '8'"),
        ({"rank": True}, "rank must be an integer >= 1, got True"),
        ({"rank": None}, "rank must be an integer >= 1, got None"),
        ({"rank": 8.0}, "rank must be an integer >= 1, got 8.0"),
        ({"seed": 1.5}, "seed must be an integer in .* got 1.5"),
        ({"seed": "0"}, "seed must be an integer in .* got '0'"),
        ({"num_directions": np.float64(2)}, "num_directions must be an integer in .* got 2.0"),
        ({"distribution": None}, "distribution must be one of .* got None"),
        ({"prefix": ["exact"]}, r"prefix must be one of .* got \['exact'\]"),
        ({"name": None}, "name must be a non-empty string .* got None"),
        ({"name": 3}, "name must be a non-empty string .* got 3"),
        ({"target_modules": None}, "target_modules must be a non-empty list .* got None"),
        (
            {"target_modules": "q_proj, v_proj"},
            r"got 'q_proj, v_proj'; pass the list \['q_proj'",
        ),
        ({"target_modules": "all-linear"}, "got 'all-linear'; name the modules .* q_proj, k_proj"),
        ({"target_modules": ["all-linear"]}, "name the modules that PEFT finds by itself"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must be a non-empty list .* 3"),
        ({"target_modules": {"q_proj": 8}}, "target_modules must be .* got dict with the keys"),
        ({"invocation": 5}, "invocation must be a non-empty text or token ids .* got 5"),
        ({"invocation": [5.0]}, r"invocation must be .* got \[5.0\]"),
        ({"invocation": [True]}, r"invocation must be .* got \[True\]"),
        ({"invocation": [-1]}, r"invocation must be .* got \[-1\]"),
        ({"invocation": [[5, 6]]}, r"invocation must be .* got \[\[5, 6\]\]"),
        ({"invocation": ["w5"]}, r"invocation must be .* got \['w5'\]"),
        ({"invocation": {"content": "w5"}}, "invocation must be .* got dict with the keys"),
    ],
)
def test_bad_values_raise(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        mezo.MeZOConfig(**change)
    assert len(str(caught.value).splitlines()) == 1


def test_numpy_and_torch_values_are_stored_as_python_values():
    given = mezo.MeZOConfig(
        rank=np.int32(4),
        alpha=torch.tensor(8),
        target_modules=np.array(["q_proj", "k_proj"]),
        lr=np.float64(1e-3),
        eps=torch.tensor(0.5),
        seed=np.uint64(2**64 - 1),
        num_directions=torch.tensor(2),
        clip=np.float32(0.25),
        invocation=torch.tensor([5, 6]),
        name=np.str_("run"),
    )
    plain = mezo.MeZOConfig(
        rank=4,
        alpha=8,
        target_modules=("q_proj", "k_proj"),
        lr=1e-3,
        eps=0.5,
        seed=2**64 - 1,
        num_directions=2,
        clip=0.25,
        invocation=(5, 6),
        name="run",
    )
    assert given == plain
    fields = dataclasses.asdict(given)
    types = {name: type(value) for name, value in dataclasses.asdict(plain).items()}
    assert {name: type(value) for name, value in fields.items()} == types
    assert json.dumps(fields) == json.dumps(dataclasses.asdict(plain))


def test_activated_needs_an_invocation():
    config = mezo.MeZOConfig(prefix="activated", invocation=[5, 6])
    assert config.invocation == (5, 6)
    for invocation in (None, "", ()):
        with pytest.raises(ValueError, match="invocation must be a non-empty text or token ids"):
            mezo.MeZOConfig(prefix="activated", invocation=invocation)
    with pytest.raises(ValueError, match="invocation must be a non-empty text"):
        mezo.MeZOConfig(invocation="")
