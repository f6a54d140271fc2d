"""perturbed_lora on every backend: the factors' bits, float64, other rows, views, bad inputs."""

import re

import pytest
import torch

import mezo_kernels as mk
from bench.experiments import _native
from bench.experiments.lora import cuda as lora_cuda
from tests.bench.experiments.lora_cases import (
    BFLOAT16,
    CHECKS,
    FLOAT16,
    FLOAT32,
    NEXT,
    Problem,
    Target,
    assert_right,
    make,
)
from tests.support.interpreted import run_interpreted

pytestmark = pytest.mark.proof

TARGETS = {
    "reference": Target("reference", "cpu", is_invariant=False),
    "cpu": Target("cpu", "cpu", is_invariant=False),
    "cuda_on_host": Target("cuda", "cpu", (FLOAT16, BFLOAT16), takes_odd=False),
    "cuda": Target("cuda", "cuda", (FLOAT16, BFLOAT16), takes_odd=False),
    "triton": Target("triton", "cuda"),
}


@pytest.fixture(
    params=[
        "reference",
        "cpu",
        "cuda_on_host",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def target(request):
    wanted = TARGETS[request.param]
    if request.param == "cuda_on_host":
        request.getfixturevalue("on_host")
    elif (reason := reason_against(wanted.name)) is not None:
        pytest.skip(reason)
    return wanted


def reason_against(name):
    """Why a backend is not usable here, or None."""
    reason = mk.backends()[name]
    return _native.reason_against_cuda() if reason is None and name == "cuda" else reason


@pytest.mark.parametrize("check", CHECKS)
def test_backend(target, check):
    CHECKS[check](target)


@pytest.fixture(scope="module")
def interpreted():
    """What each check said, in a process whose triton interprets."""
    pytest.importorskip("triton")
    return run_interpreted("tests.bench.experiments.lora_cases", "-W", "error")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_triton_interpreted(interpreted, check):
    assert interpreted[check] is None, interpreted[check]


@pytest.mark.parametrize("chunks", [(2, 3), (5, 1)], ids=str)
def test_cuda_blocks_may_share_the_rows(on_host, monkeypatch, chunks):
    problem = make(BFLOAT16, 16, rows=(100, 40), has_out=True)
    target = TARGETS["cuda_on_host"]
    expected = problem.run(target)
    monkeypatch.setattr(lora_cuda, "chunks", lambda sent, splits: chunks)
    assert torch.equal(problem.run(target), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_projection_of_a_large_model(name):
    # More blocks than a device holds, and rows that they share.
    if (reason := reason_against(name)) is not None:
        pytest.skip(reason)
    for rank in (8, 16):
        assert_right(make(BFLOAT16, rank, 4096, 14336, (700, 900), has_out=True), TARGETS[name])


def test_a_planted_error_is_seen():
    # The sign of one copy.
    problem = make(FLOAT32)
    reference, _, bound = problem.reference()
    problem.scales = [0.05, 0.05]
    wrong = problem.run(TARGETS["reference"])
    assert float((wrong - reference).abs().max()) > 1000 * bound


def changed(**changes) -> Problem:
    problem = make(FLOAT32, 8, 24, 16, rows=(3, 2), has_out=True)
    for name, value in changes.items():
        setattr(problem, name, value)
    return problem


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.zeros(5, 23)}, r"x, a and b must be \[T, D_in\], \[R, D_in\] and \[D_out, R"),
        ({"b": torch.zeros(16, 7)}, r"x, a and b must be .*, got \(5, 24\), \(8, 24\) and \(16, 7"),
        ({"x": torch.zeros(5, 24).double()}, r"x must be one of .*, got torch.float64"),
        ({"a": torch.zeros(8, 24).half()}, "a must be torch.float32, got torch.float16"),
        ({"b": torch.zeros(16, 8).half()}, "b must be torch.float32, got torch.float16"),
        ({"out": torch.zeros(5, 15)}, r"out must be \[T, D_out\] in the dtype of x, \(5, 16\)"),
        ({"out": torch.zeros(5, 16).half()}, r"out must be .*, got \(5, 16\) torch.float16"),
        ({"out": torch.zeros(16, 5).T}, r"out must have stride\(-1\) == 1"),
        ({"x": torch.zeros(1, 24).expand(5, 24)}, "x must have .* rows that do not overlap"),
        ({"a": torch.zeros(8, 24, device="meta")}, "a must be on cpu like x, got meta"),
        ({"a_spec": mk.TensorSpec("A", (8, 23))}, r"a_spec must have the shape .*\(8, 24\), got"),
        ({"b_spec": mk.TensorSpec("B", (8, 16))}, r"b_spec must have the shape .*\(16, 8\), got"),
        ({"scales": [1.0]}, "directions and scales must have one length, got 2 and 1"),
        ({"scales": [1.0, float("nan")]}, r"scales\[1\] must be finite in fp32, got nan"),
        ({"row_indptr": [0, 5]}, "row_indptr must be 3 ints from 0 to 5, one range for each"),
        ({"row_indptr": [0, 3, 4]}, r"row_indptr must be 3 .*, got 3 from \(0,\) to \(4,\)"),
        ({"row_indptr": [0, 6, 5]}, r"row_indptr must not decrease, got \(0, 6, 5\)"),
    ],
)
def test_rejects(changes, match):
    with pytest.raises(ValueError, match=match) as error:
        changed(**changes).run(TARGETS["reference"])
    assert str(error.value).startswith("perturbed_lora: ")
    # The remedy is the clause after the semicolon.
    assert ";" in str(error.value)


def misaligned(*shape: int) -> torch.Tensor:
    return torch.zeros(shape[0] * shape[1] + 1, dtype=torch.float16)[1:].view(*shape)


@pytest.mark.parametrize(
    ("arguments", "changes", "match"),
    [
        ({"dtype": FLOAT32}, {}, "multiplies fp16 and bf16 on tensor cores, got x of torch.float3"),
        ({"rank": 4}, {}, r"must have a rank of \[8, 16, 32, 64\], got 4; use 'triton'"),
        ({"d_in": 27}, {}, r"rows of x that .* multiples of 8 long, got shape \(5, 27\)"),
        ({"d_out": 12}, {}, r"rows of out that .* got shape \(5, 12\)"),
        ({}, {"x": misaligned(5, 24)}, "rows of x that begin at multiples of 16 bytes"),
        ({"shard": "odd"}, {}, "a_spec with col0 and global columns that are multiples of 8"),
    ],
)
def test_cuda_names_what_takes_the_rest(on_host, arguments, changes, match):
    sizes = {"dtype": FLOAT16, "rank": 8, "d_in": 24, "d_out": 16, "rows": (3, 2)}
    problem = make(**(sizes | arguments))
    for name, value in changes.items():
        setattr(problem, name, value)
    with pytest.raises(NotImplementedError, match=match) as error:
        problem.run(TARGETS["cuda_on_host"])
    assert re.match(r"perturbed_lora: backend 'cuda' .*; use 'triton'", str(error.value))


def test_autograd_sees_nothing():
    problem = make(FLOAT32, has_out=True)
    problem.a.requires_grad_()
    problem.x.requires_grad_()
    y = problem.run(TARGETS["reference"])
    assert not y.requires_grad


def test_copies_of_a_direction_are_taken_in_pairs():
    from bench.experiments.lora.call import LoraCall

    problem = make(FLOAT32)
    other = mk.Direction(1, 1)
    call = LoraCall(
        problem.x, problem.a, problem.b, problem.a_spec, problem.b_spec,
        (NEXT, other, NEXT, other, NEXT, other), (0.1, 0.2, 0.3, 0.0, 0.5, 0.6),
        (0, 10, 20, 30, 40, 75, 75), 1.0, problem.x, is_added=False,
    )  # fmt: skip
    assert call.pairs() == [
        (0, 0, 2, 0, 20, 10, 30, 0),
        (0, 4, 4, 40, 0, 75, 0, 0),
        (1, 1, 1, 10, 0, 20, 0, 0),
        (-1, 3, 3, 30, 0, 40, 0, 0),
    ]
