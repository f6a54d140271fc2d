"""Which attention kernel a batch uses, and that each gives the same step."""

from __future__ import annotations

import dataclasses
import json
import random
import sys

import pytest
import torch

import mezo
from mezo_kernels import SharedPrefixPlan
from mezo_kernels.attention import flashinfer
from tests.support import fake_flashinfer
from tests.support.independent import activated_pair, check_activated_step
from tests.support.tiny import LINEARS, random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(
    rank=8,
    alpha=16,
    target_modules=LINEARS,
    lr=1e-3,
    eps=1e-2,
    seed=4,
    prefix="activated",
    invocation=(77, 8),
)


def point(prefix, rows, gqa=4, head_dim=128, suffix=8, **us):
    shape = {"prefix": prefix, "suffix": suffix, "rows": rows, "gqa": gqa, "head_dim": head_dim}
    return {**shape, "us": us}


def plan(*groups):
    """A batch of groups (prefix tokens, rows) with 8 tokens a row."""
    num_rows = [rows for _, rows in groups]
    lens = [prefix for prefix, _ in groups]
    return SharedPrefixPlan(
        list(range(0, 8 * sum(num_rows) + 1, 8)),
        [sum(num_rows[:i]) for i in range(len(groups) + 1)],
        [sum(lens[:i]) for i in range(len(groups) + 1)],
        torch.arange(sum(lens)),
    )


@pytest.fixture
def kernels():
    from mezo.engines.sglang.batch import attention_kernels

    return attention_kernels


@pytest.fixture
def points():
    return (
        point(256, 2, triton=5.0, composed=9.0, sglang_triton=4.0),
        point(16384, 2, triton=50.0, composed=45.0, sglang_triton=100.0),
        point(16384, 2, gqa=1, triton=70.0, composed=90.0, sglang_triton=100.0),
        point(16384, 32, triton=60.0, composed=90.0, sglang_triton=1600.0),
    )


@pytest.mark.parametrize(
    ("groups", "gqa", "expected"),
    [
        ([(300, 2)], 4, "sglang_triton"),
        ([(9000, 2)], 4, "composed"),
        ([(9000, 2)], 1, "triton"),
        ([(12000, 16)], 4, "triton"),
        ([(300, 2)] * 20 + [(9000, 2)], 4, "triton"),  # 150; sglang_triton 180, composed 225
        ([(300, 2), (0, 1), (0, 1)], 4, "sglang_triton"),  # nothing shared counts nothing
        ([(0, 1)], 4, "triton"),
    ],
)
def test_the_kernel_with_the_least_time_over_all_groups_wins(
    kernels, points, groups, gqa, expected
):
    names = ("triton", "composed", "sglang_triton", "flashinfer")
    assert kernels.fastest(plan(*groups), points, names, gqa=gqa, head_dim=128) == expected


def test_never_slower_at_a_measured_point(kernels):
    rng = random.Random(0)
    names = ("triton", "composed", "flashinfer", "sglang_triton")
    points = [
        point(prefix, rows, gqa, **{name: rng.uniform(1, 100) for name in names})
        for prefix in (256, 2048, 32768)
        for rows in (2, 8, 32)
        for gqa in (1, 4, 8)
    ]
    for p in points:
        batch = plan((p["prefix"], p["rows"]))
        best = kernels.fastest(batch, points, names, gqa=p["gqa"], head_dim=128)
        assert p["us"][best] == min(p["us"].values())


def test_points_are_those_of_the_device_and_the_engines_backend(
    kernels, points, tmp_path, monkeypatch
):
    monkeypatch.setattr(kernels, "_POINTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    kernels.points_of.cache_clear()
    batch, gpu = plan((300, 2)), torch.device("cuda")
    options = {"gqa": 4, "head_dim": 128}
    assert kernels.choose(batch, device=gpu, engines_own="triton", **options) == "triton"
    kernels.points_of.cache_clear()
    (tmp_path / "nvidia-h100.json").write_text(json.dumps({"points": points}))
    assert kernels.choose(batch, device=gpu, engines_own="triton", **options) == "engine"
    # What another backend of the engine needs has not been measured.
    assert kernels.choose(batch, device=gpu, engines_own="fa3", **options) == "triton"
    cpu = torch.device("cpu")
    assert kernels.choose(batch, device=cpu, engines_own="triton", **options) == "triton"
    kernels.points_of.cache_clear()


def test_a_named_kernel_that_cannot_run_is_refused(kernels, monkeypatch):
    caches = [torch.zeros(8, 2, 64, dtype=torch.bfloat16)] * 2
    for name in ("triton", "engine", ""):
        monkeypatch.setenv("MEZO_ATTENTION_KERNEL", name)
        kernels.check_named(*caches)
    monkeypatch.setenv("MEZO_ATTENTION_KERNEL", "fastest")
    with pytest.raises(ValueError, match="MEZO_ATTENTION_KERNEL must be one of"):
        kernels.check_named(*caches)
    monkeypatch.setenv("MEZO_ATTENTION_KERNEL", "flashinfer")
    # On any device, the package is not there.
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    reason_against = flashinfer.reason_against
    monkeypatch.setattr(flashinfer, "reason_against", lambda _: reason_against("cuda"))
    said = (
        r"must name a kernel that runs in this engine, got 'flashinfer' .*`pip install flashinfer"
    )
    with pytest.raises(ValueError, match=said):
        kernels.check_named(*caches)
    # The package is there, and does not take these tensors.
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    kernels.check_named(*caches)
    for other in (torch.zeros(8, 2, 64), torch.zeros(8, 2, 80, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"got 'flashinfer' .* use 'triton'\); unset"):
            kernels.check_named(other, other)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["engine", "composed"])
def test_steps_are_those_of_base_keys_and_values_with_peft(kernel, tiny_model_dir, start_engine):
    model_dir = tiny_model_dir("llama")
    with pytest.MonkeyPatch.context() as patch:
        # For the engine's processes, which start now.
        patch.setenv("MEZO_ATTENTION_KERNEL", kernel)
        if kernel == "composed":
            patch.setenv("TRITON_INTERPRET", "1")
        engine = start_engine(model_dir, CONFIG, max_total_tokens=2048)
    rng = random.Random(1)
    pair = activated_pair(model_dir, CONFIG)
    with mezo.attach(engine, CONFIG) as run:
        batch = random_batch(rng, size=2, kind="classification")
        check_activated_step(run, pair, batch)
        assert check_activated_step(run, pair, batch).prompt_tokens == 0


@pytest.mark.slow
def test_a_kernel_that_cannot_run_is_refused_at_attach(tiny_model_dir, start_engine):
    with pytest.MonkeyPatch.context() as patch:
        # FlashInfer does fp32 nowhere.
        patch.setenv("MEZO_ATTENTION_KERNEL", "flashinfer")
        engine = start_engine(tiny_model_dir("llama"), CONFIG)
    with pytest.raises(ValueError, match="MEZO_ATTENTION_KERNEL must name a kernel that runs"):
        mezo.attach(engine, dataclasses.replace(CONFIG, name="other"))
