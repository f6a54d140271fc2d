"""MezoConfig: every bad value is refused with one clear sentence."""

from __future__ import annotations

import pytest

import mezo


def test_defaults_and_normalisation():
    config = mezo.MezoConfig(rank=4, alpha=8, target_modules=["q_proj"])
    assert config.target_modules == ("q_proj",)
    assert config.scaling == 2.0
    assert mezo.MezoConfig(lr=0.0).lr == 0.0


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
    ],
)
def test_bad_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        mezo.MezoConfig(**change)


def test_activated_needs_an_invocation():
    config = mezo.MezoConfig(prefix="activated", invocation=[5, 6])
    assert config.invocation == (5, 6)
    for invocation in (None, "", ()):
        with pytest.raises(ValueError, match="invocation must be a non-empty text or token ids"):
            mezo.MezoConfig(prefix="activated", invocation=invocation)
    with pytest.raises(ValueError, match="invocation must be a non-empty text"):
        mezo.MezoConfig(invocation="")
