"""The reference's fma and sqrt against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mezo_kernels.directions.fp32 import fma, sqrt

LARGEST = torch.finfo(torch.float32).max


def rounded(value: Fraction) -> float:
    """`value` rounded to fp32, ties to even; written with rationals only."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    # log2 of a rational may be one off at a power of two.
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    # round() of a Fraction is to the nearest even integer.
    result = round(value / ulp) * ulp
    return math.copysign(math.inf, value) if abs(result) >= 2**128 else float(result)


def assert_exact(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    got = fma(a, b, c).tolist()
    for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), got, strict=True):
        assert value == rounded(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)


def random_fp32(n: int, low: int, high: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(2**23, 2**24, (n,), generator=generator).to(torch.float64)
    exponent = torch.randint(low, high, (n,), generator=generator).to(torch.float64)
    sign = 1.0 - 2.0 * torch.randint(0, 2, (n,), generator=generator)
    return (sign * mantissa * torch.exp2(exponent - 23)).to(torch.float32)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-3, 4), (-30, 30), (-75, -60), (-130, -100), (60, 65)],
    ids=["cancellation", "wide", "subnormal", "all subnormal", "overflow"],
)
def test_fma_is_the_exact_result_rounded_once(low, high):
    n = 4000
    a, b, c = (random_fp32(n, low, high, seed) for seed in range(3))
    assert_exact(a, b, c)
    # c = -a b up to one rounding: everything but the last bits cancels.
    opposite = -(a * b).clamp(-LARGEST, LARGEST)
    assert_exact(a, b, opposite)
    assert_exact(a, b, torch.nextafter(opposite, torch.zeros(n)))


def test_fma_rounds_ties_to_even_and_just_off_ties_away_from_them():
    ulp = 2.0**-23
    one = torch.tensor([1.0, 1.0 + ulp, 1.0, 1.0 + ulp, -1.0, -1.0 - ulp])
    half_ulp = torch.tensor([ulp / 2] * 4 + [-ulp / 2] * 2)
    assert_exact(half_ulp, torch.ones(6), one)
    # A float64 sum hides an error this small; only rounding to odd keeps it.
    for nudge in (1.0 + ulp, 1.0 - ulp / 2):
        assert_exact(half_ulp, torch.full((6,), nudge), one)
    tiny = torch.full((6,), 2.0**-60)
    assert_exact(tiny, torch.tensor([1.0, -1.0] * 3), one + half_ulp)
    assert_exact(torch.tensor([2.0**-100]), torch.tensor([1.0]), torch.tensor([1.0]))


def test_fma_of_special_values_follows_ieee():
    inf, nan = math.inf, math.nan
    a = torch.tensor([inf, inf, nan, 0.0, -0.0, 1.0, 3e38])
    b = torch.tensor([1.0, 0.0, 1.0, inf, 1.0, -1.0, 2.0])
    c = torch.tensor([-1.0, 1.0, 1.0, 1.0, -0.0, 1.0, 1.0])
    got = fma(a, b, c).tolist()
    assert got[0] == inf
    assert got[6] == inf
    assert all(math.isnan(value) for value in got[1:4])
    assert math.copysign(1.0, got[4]) == -1.0
    assert math.copysign(1.0, got[5]) == 1.0


def test_sqrt_is_correctly_rounded():
    x = random_fp32(1_000_000, -126, 127, 0).abs()
    # IEEE sqrt of the C library, which numpy calls.
    assert np.array_equal(sqrt(x).numpy(), np.sqrt(x.numpy()))
