"""exp and tanh of the native kernels: against float64, at their edges, bit by bit."""

import pytest
import torch

from mezo_kernels import _native


@pytest.fixture(params=["exps", "tanhs"])
def name(request):
    return request.param


def call(name: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    getattr(_native.module(), name)(out.data_ptr(), x.data_ptr(), len(x))
    return out


def inputs(name: str) -> torch.Tensor:
    """Every 61st float from 0 to beyond where the function ends; for tanh of both signs."""
    last = torch.tensor(90.0).view(torch.int32).item()
    x = torch.arange(0, last, 61, dtype=torch.int32).view(torch.float32)[::7]
    # Most floats are tiny; as many again evenly over the range.
    x = torch.cat((x, torch.linspace(0, 90, 1_000_003)))
    return -x if name == "exps" else torch.cat((x, -x))


def in_ulps(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Error in units of the last place of the reference, normal numbers only."""
    exponent = torch.frexp(reference.abs()).exponent
    ulp = torch.ldexp(torch.ones_like(reference), exponent - 24)
    return (ours.double() - reference).abs() / ulp


def test_exp_is_within_1_ulp(isa):
    x = inputs("exps")
    x = x[x >= -87]
    error = in_ulps(call("exps", x), x.double().exp())
    assert float(error.max()) <= 1


def test_tanh_is_within_2_ulp(isa):
    x = inputs("tanhs")
    x = x[x.abs() > 2**-100]
    error = in_ulps(call("tanhs", x), x.double().tanh())
    assert float(error.max()) <= 2


def test_edges(isa):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([0.0, -0.0, -87.0, -87.0001, -1e30, -3e38, -inf, nan, -(2.0**-140)])
    y = call("exps", x)
    assert torch.equal(y[:2], torch.ones(2))
    assert y[2] > 0
    assert torch.equal(y[3:7], torch.zeros(4))
    assert y[7].isnan()
    assert y[8] == 1
    odd_nan = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    assert call("exps", odd_nan).isnan().all()
    y = call("tanhs", torch.tensor([0.0, -0.0, inf, -inf, 50.0, -50.0, nan]))
    assert torch.equal(y[:6], torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0, -1.0]))
    assert torch.equal(y[:2].signbit(), torch.tensor([False, True]))
    assert y[6].isnan()


def test_bits_do_not_depend_on_the_instruction_set(name, isas, bits):
    # A length that fills no vector.
    x = inputs(name)[:-3]
    results = [bits(call(name, x)) for _ in isas()]
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_bound_sees_a_planted_error(native):
    x = inputs("exps")
    x = x[x >= -87]
    wrong = call("exps", x) * (1 + 2**-23)
    assert float(in_ulps(wrong, x.double().exp()).max()) > 1
