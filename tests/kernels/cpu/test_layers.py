"""Norm, rotary embedding and gated activation against float64, at edges, bit by bit."""

from __future__ import annotations

import random

import pytest
import torch

from mezo_kernels import cpu as layers
from tests.support import exact_layers
from tests.support.gates import assert_close_to_reference

EPS = 1e-5
FUNCTIONS = ("norm", "norm + residual", "rotary", "silu")
BACKENDS = ("cpu", "reference")


def case(name: str, seed: int, rows: int, width: int) -> tuple[list[torch.Tensor], dict]:
    """Rows, cut out of wider ones, and what they share."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def wide(width: int) -> torch.Tensor:
        return normal(rows, width + 5)[:, 2 : width + 2]

    if name == "rotary":
        table = normal(40, width + 3)[:, :width]
        positions = torch.randint(0, 40, (rows,), generator=generator)
        return [wide(3 * width), positions], {"cos_sin": table}
    if name == "silu":
        return [wide(2 * width) * 4], {}
    return [wide(width) for _ in range(1 + (name != "norm"))], {"weight": normal(width)}


def call(name: str, rows: list[torch.Tensor], shared: dict, backend: str | None = None):
    """The outputs, `[T, ...]` each."""
    if name == "rotary":
        return [layers.rotary(rows[0], shared["cos_sin"], rows[1], backend=backend)]
    if name == "silu":
        return [layers.silu_and_mul(rows[0], backend=backend)]
    x, residual = (*rows, None)[:2]
    normed, summed = layers.rms_norm(x, shared["weight"], EPS, residual, backend=backend)
    return [normed, summed]


def exact(name: str, rows: list[torch.Tensor], shared: dict) -> list[torch.Tensor]:
    """The same from the definitions, in float64."""
    if name == "rotary":
        cos, sin = shared["cos_sin"][rows[1]].chunk(2, -1)
        return [exact_layers.rotary(rows[0], cos, sin)]
    if name == "silu":
        return [exact_layers.silu_and_mul(rows[0])]
    summed = sum(row.double() for row in rows)
    return [exact_layers.rms_norm(summed, shared["weight"], EPS), summed]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_float64(name, backend, isa):
    choose = random.Random(f"{name} {isa}")
    for seed in range(20):
        width = 2 * choose.choice([1, 3, 8, 9, 16, 31, 32, 96, 288, 300])
        rows, shared = case(name, seed, choose.randint(1, 9), width)
        for ours, reference in zip(
            call(name, rows, shared, backend), exact(name, rows, shared), strict=True
        ):
            assert_close_to_reference(ours, None, reference, 2**-22 * float(reference.abs().max()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bits_do_not_depend_on_the_instruction_set_or_threads(name, isas, threads, bits):
    for seed, width in enumerate((2, 30, 64, 576, 602)):
        rows, shared = case(name, seed, 11, width)
        results = [list(map(bits, call(name, rows, shared, "cpu"))) for _ in isas()]
        torch.set_num_threads(1)
        results.append(list(map(bits, call(name, rows, shared, "cpu"))))
        assert all(all(map(torch.equal, result, results[0])) for result in results)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_does_not_depend_on_the_others(name, isa, bits):
    rows, shared = case(name, 5, 9, 70)
    whole = call(name, rows, shared, "cpu")
    for i in range(9):
        alone = call(name, [row[i : i + 1] for row in rows], shared, "cpu")
        for ours, all_rows in zip(alone, whole, strict=True):
            assert torch.equal(bits(ours), bits(all_rows[i : i + 1]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_stay_and_no_rows_are_no_rows(name, native):
    rows, shared = case(name, 1, 4, 50)
    before = [tensor.clone() for tensor in (*rows, *shared.values())]
    outputs = call(name, rows, shared)
    assert all(map(torch.equal, (*rows, *shared.values()), before))
    nothing = call(name, [row[:0] for row in rows], shared)
    assert [out.shape for out in nothing] == [(0, *out.shape[1:]) for out in outputs]


def test_silu_at_its_ends(isa):
    gate = torch.tensor([[0.0, -0.0, 100.0, -100.0, -80.0, torch.inf, torch.nan, 3e38]])
    ours = layers.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), -1), backend="cpu")[0]
    assert torch.equal(ours[:4], torch.tensor([0.0, -0.0, 100.0, 0.0]))
    assert -2e-33 < float(ours[4]) < -1e-33
    assert torch.equal(ours[[5, 7]], gate[0, [5, 7]])
    assert ours[6].isnan()


def test_nan_stays_in_its_row(isa):
    rows, shared = case("norm", 2, 4, 40)
    expected, _ = call("norm", rows, shared, "cpu")
    rows[0][2, 39] = torch.nan
    normed, _ = call("norm", rows, shared, "cpu")
    assert normed[2].isnan().all()
    assert torch.equal(normed[[0, 1, 3]], expected[[0, 1, 3]])


def test_the_gate_sees_a_planted_error(native):
    for name, wrong in {"norm": "weight", "rotary": "cos_sin"}.items():
        rows, shared = case(name, 3, 5, 64)
        reference = exact(name, rows, shared)[0]
        shared[wrong][..., 33] *= 1 + 2**-18
        with pytest.raises(AssertionError, match="error"):
            assert_close_to_reference(
                call(name, rows, shared, "cpu")[0],
                None,
                reference,
                2**-22 * float(reference.abs().max()),
            )


def test_bad_input_gets_a_sentence(native):
    x, weight, table = torch.randn(3, 8), torch.ones(8), torch.randn(5, 4)
    places = torch.tensor([0, 1, 4])
    for message, mistake in {
        r"rms_norm: x must be \[rows, columns\]": lambda: layers.rms_norm(x[0], weight, EPS),
        "rms_norm: weight must be": lambda: layers.rms_norm(x, weight[:4], EPS),
        "rms_norm: residual must be": lambda: layers.rms_norm(x, weight, EPS, x[:2]),
        "rotary: x must be .* torch.bfloat16": lambda: layers.rotary(x.bfloat16(), table, places),
        "rotary: cos_sin must be": lambda: layers.rotary(x, torch.randn(5, 6), places),
        "rotary: positions must be": lambda: layers.rotary(x, table, places[:2]),
        "silu_and_mul: x must be .* stride": lambda: layers.silu_and_mul(x.T.contiguous().T),
        "silu_and_mul: x must be .*2 . D": lambda: layers.silu_and_mul(x[:, :7]),
        "backend must be one of .*'reference', 'cpu'": lambda: layers.silu_and_mul(
            x, backend="triton"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            mistake()
    for place in (5, -1):
        with pytest.raises(IndexError, match=f"cos_sin, 0 to 4, got {place}; pass a longer table"):
            layers.rotary(x, table, torch.tensor([0, place, 1]))


def test_without_the_native_module(no_native):
    rows, shared = case("norm", 1, 2, 16)
    assert torch.equal(*(call("norm", rows, shared, b)[0] for b in (None, "reference")))
    with pytest.raises(RuntimeError, match="rms_norm: backend='cpu' is not usable here: The nati"):
        call("norm", rows, shared, "cpu")
