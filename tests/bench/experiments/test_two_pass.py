"""Attention in two passes of SGLang's kernels: in Triton's interpreter, and on a GPU."""

import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from bench.experiments.attention import two_pass as module
from tests.bench.experiments.interpreted_two_pass import CHECKS, limit, make, two_pass
from tests.support.gates import assert_close_to_reference
from tests.support.interpreted import run_interpreted
from tests.support.shared_prefix import Batch, random_batch, shuffle_rows

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def results():
    """What each check said, in a process whose triton interprets."""
    return run_interpreted("tests.bench.experiments.interpreted_two_pass")


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] is None, results[check]


@pytest.mark.sglang
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 64, 64), (8, 1, 128, 128), (6, 2, 96, 64)], ids=str)
def test_on_a_gpu_against_float64(dtype, shape):
    for soft_cap in (0.0, 2.0):
        batch, options = make(dtype, shape), {"soft_cap": soft_cap, "return_lse": True}
        reference, reference_lse = batch.reference(**options)
        same, same_lse = batch.attend(backend="reference", **options)
        shuffled, plan, places = shuffle_rows(batch, 5)
        moved = Batch([t.cuda() for t in shuffled.tensors], batch.ranges, batch.scale)
        ours, lse = (result.cpu()[places] for result in two_pass(moved, plan, **options))
        assert_close_to_reference(ours, same, reference, limit(batch, reference))
        assert_close_to_reference(lse, same_lse, reference_lse, 2**-24 * 16 * shape[2] ** 0.5)


@pytest.mark.parametrize("function", ["two_pass_attention", "prefix_per_row"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale must not be 0"),
        ({"q": torch.zeros(3, 4, 16)}, r"q must be \(23, 4, 16\)"),
        ({"k_cache": torch.zeros(5, 1, 16)}, "k_cache must be"),
        ({"v_suffix": torch.zeros(23, 3, 16)}, "k_suffix must be"),
        ({"k_suffix": torch.zeros(23, 2, 16).half()}, "k_suffix must have the dtype of q"),
        ({"out": torch.zeros(23, 4, 8)}, r"out must be \(23, 4, 16\)"),
    ],
    ids=["scale", "q", "k_cache", "v_suffix", "dtype", "out"],
)
def test_what_does_not_fit_is_refused_before_a_launch(function, change, message, monkeypatch):
    monkeypatch.setattr(module, "_kernel", lambda: pytest.fail)
    batch = random_batch([(4, (3, 20))])
    names = ("q", "k_suffix", "v_suffix", "k_cache", "v_cache")
    arguments = dict(zip(names, batch.tensors, strict=True))
    arguments |= {"plan": batch.plan(), "scale": 0.25} | change
    with pytest.raises(ValueError, match=message):
        getattr(module, function)(**arguments)


@pytest.mark.parametrize("is_there", [False, True])
def test_an_sglang_that_cannot_do_it_is_named(is_there, monkeypatch):
    package, path = "sglang", ("kernels", "ops", "attention", "extend_attention")
    for name in ("", *path):
        package += "." * bool(name) + name
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    if is_there:
        older = {"extend_attention_fwd": lambda q, skip_extend=False: None}
        vars(sys.modules[package]).update(older)
    module._kernel.cache_clear()
    batch = random_batch([(4, (3, 20))])
    said = "without lse_extend, skip_prefix; use SGLang" if is_there else "must be there to import"
    with pytest.raises(RuntimeError, match=said):
        two_pass(batch, batch.plan())
    assert not module._kernel.cache_info().currsize
