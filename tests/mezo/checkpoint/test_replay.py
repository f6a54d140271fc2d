"""Replay gives what training gave: steps one by one, engines' runs, shards, every backend."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import mezo
from mezo.checkpoint import replay as replay_module
from mezo.checkpoint.replay import replay
from mezo_kernels import TensorSpec
from tests.support.interpreted import run_interpreted
from tests.support.replays import (
    DISTRIBUTIONS,
    SPECS,
    has_bits_of,
    history,
    replayed,
    step_by_step,
)
from tests.support.tiny import LINEARS, load_model, random_batch


@pytest.fixture
def parts_of_four_steps(monkeypatch):
    """Makes calls so short that each has four steps of one direction."""
    size = sum(spec.shape[0] * spec.shape[1] for spec in SPECS)
    monkeypatch.setattr(replay_module, "_NORMALS_PER_CALL", 4 * size)


@pytest.mark.usefixtures("parts_of_four_steps")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_step_of_a_run(distribution, num_directions, backend):
    coefficients = history(11, num_directions)
    is_skipped = np.isin(np.arange(11), (0, 4, 5, 10))
    coefficients[is_skipped] = np.nan  # nobody reads them
    expected = step_by_step(SPECS, distribution, coefficients, is_skipped)
    for at in range(12):
        found = replayed(
            distribution=distribution,
            coefficients=coefficients,
            is_skipped=is_skipped,
            at=at,
            backend=backend,
        )
        assert has_bits_of(found, expected[at])


def test_one_wrong_coefficient_gives_other_bits():
    coefficients = history(6, 2)
    right = step_by_step(SPECS, "gaussian", coefficients)[-1]
    assert has_bits_of(replayed(coefficients=coefficients), right)
    coefficients[3, 1] = np.nextafter(coefficients[3, 1], np.float32(1))
    assert not has_bits_of(replayed(coefficients=coefficients), right)


def test_the_order_of_steps_counts():
    # Values so different in size that a sum in another order rounds differently.
    coefficients = np.float32([[1.0], [1e-4], [-1.0], [3e-5]])
    right = step_by_step(SPECS, "gaussian", coefficients)[-1]
    assert has_bits_of(replayed(coefficients=coefficients), right)


def test_all_coefficients_of_a_type_that_holds_them():
    coefficients = history(5, 1)
    right = replayed(coefficients=coefficients)
    assert has_bits_of(replayed(coefficients=torch.from_numpy(coefficients)), right)
    assert has_bits_of(replayed(coefficients=coefficients.astype(np.float64)), right)
    read_only = coefficients.copy()
    read_only.flags.writeable = False  # as those of a mapped file
    skipped = torch.zeros(5, dtype=torch.bool)
    assert has_bits_of(replayed(coefficients=read_only, is_skipped=skipped), right)


def test_a_start_in_place_of_theta_0():
    coefficients = history(7, 1)
    start = [torch.full(spec.shape, 0.25) for spec in SPECS]
    kept = [tensor.clone() for tensor in start]
    expected = step_by_step(SPECS, "gaussian", coefficients, start=kept)[-1]
    assert has_bits_of(replayed(coefficients=coefficients, start=start), expected)
    assert has_bits_of(start, kept)


def test_a_snapshot_goes_on_where_it_was_taken():
    coefficients = history(9, 1)
    snapshot = replayed(coefficients=coefficients, at=5)
    turned = [tensor.t().contiguous().t() for tensor in snapshot]
    found = replayed(coefficients=coefficients, start=turned, is_skipped=np.arange(9) < 5)
    assert has_bits_of(found, replayed(coefficients=coefficients))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_shards_are_slices_of_the_whole(distribution):
    coefficients = history(5, 2)
    places = [
        (slice(1, 3), slice(0, 37)),
        (slice(33, 129), slice(0, 4)),
        (slice(0, 8), slice(5, 200)),
    ]
    shards = [
        TensorSpec(s.name, (r.stop - r.start, c.stop - c.start), r.start, c.start, s.shape)
        for s, (r, c) in zip(SPECS, places, strict=True)
    ]
    whole = replayed(coefficients=coefficients, distribution=distribution)
    parts = replayed(shards, coefficients=coefficients, distribution=distribution)
    cut = [tensor[place].contiguous() for tensor, place in zip(whole, places, strict=True)]
    assert has_bits_of(parts, cut)


@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_run_of_an_engine(tiny_model_dir, distribution, num_directions):
    config = mezo.MeZOConfig(
        rank=4,
        target_modules=LINEARS,
        lr=1e-3,
        eps=1e-2,
        seed=12,
        num_directions=num_directions,
        distribution=distribution,
    )
    rng = random.Random(distribution)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        results, weights = [], [run.weights()]
        for _ in range(4):
            results.append(run.step(random_batch(rng)))
            weights.append(run.weights())
    coefficients = torch.tensor([result.coefficients for result in results])
    assert coefficients.shape == (4, num_directions)
    specs = [TensorSpec(name, tuple(value.shape)) for name, value in weights[0].items()]
    for at, expected in enumerate(weights):
        for backend in ("reference", "cpu"):
            found = replay(
                specs,
                seed=config.seed,
                distribution=distribution,
                num_directions=num_directions,
                coefficients=coefficients,
                at=at,
                backend=backend,
            )
            assert has_bits_of(found, expected.values())


@pytest.mark.usefixtures("parts_of_four_steps")
def test_progress_tells_the_steps_done():
    calls = []
    replayed(coefficients=history(11, 1), at=10, progress=lambda *call: calls.append(call))
    assert calls == [(0, 10), (4, 10), (8, 10), (10, 10)]
    calls.clear()
    replayed(coefficients=history(11, 1), at=0, progress=lambda *call: calls.append(call))
    assert calls == [(0, 0)]


def test_triton_interpreted():
    pytest.importorskip("triton")
    results = run_interpreted("tests.support.replays")
    assert results == dict.fromkeys(DISTRIBUTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_gpu(backend):
    coefficients = history(50, 1)
    found = replayed(coefficients=coefficients, backend=backend)
    assert all(tensor.is_cuda for tensor in found)
    expected = replayed(coefficients=coefficients, backend="cpu")
    assert has_bits_of([tensor.cpu() for tensor in found], expected)


RIGHT = {
    "seed": 1,
    "distribution": "gaussian",
    "num_directions": 2,
    "coefficients": np.ones((3, 2), np.float32),
}
AN_INFINITE_STEP = np.float32([[1, 2], [3, np.nan], [np.inf, 4]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"coefficients": np.ones(3, np.float32)},
            r"coefficients must be of shape \(steps, 2\), .* got \(3,\)",
        ),
        ({"num_directions": 3}, r"coefficients must be of shape \(steps, 3\), .* got \(3, 2\)"),
        ({"is_skipped": np.zeros(2, bool)}, r"is_skipped must be 3 bools, .* got bool of .*\(2,\)"),
        ({"is_skipped": np.zeros(3)}, r"is_skipped must be 3 bools, .* got float64 of .*\(3,\)"),
        ({"at": 4}, "at must be a number of steps from 0 to 3, got 4; the run has no more"),
        ({"at": -1}, "at must be a number of steps from 0 to 3, got -1"),
        (
            {"coefficients": AN_INFINITE_STEP},
            "finite in fp32, got 2 steps where they are not, the first is step 1; mark steps",
        ),
        ({"coefficients": np.full((1, 2), 1e39)}, "finite in fp32, got 1 steps .* step 0"),
        ({"start": []}, "start must have one tensor per spec, 3, got 0"),
        (
            {"start": [torch.zeros(spec.shape[::-1]) for spec in SPECS]},
            r"start of layers.0.q_proj.lora_A must be float32 of shape \(4, 37\), got "
            r"torch.float32 of shape \(37, 4\)",
        ),
        (
            {"start": [torch.zeros(spec.shape, dtype=torch.float16) for spec in SPECS]},
            r"must be float32 of shape \(4, 37\), got torch.float16 of shape \(4, 37\)",
        ),
        ({"backend": "gpu"}, r"backend must be one of \[.*\], got 'gpu'"),
        ({"backend": "gpu", "at": 0}, r"backend must be one of \[.*\], got 'gpu'"),
        ({"distribution": "normal"}, "distribution must be one of .*, got 'normal'"),
    ],
)
def test_what_cannot_be_replayed(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replay(SPECS, **{**RIGHT, **changes})


def test_steps_beyond_the_asked_one_are_not_judged():
    replay(SPECS, **{**RIGHT, "coefficients": AN_INFINITE_STEP, "at": 1})


def test_a_backend_that_is_not_usable_here_says_why():
    with pytest.raises(RuntimeError, match="backend='cuda' is not usable here"):
        replay(SPECS, **RIGHT, backend="cuda", device="cpu")
