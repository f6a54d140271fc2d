"""Correctly rounded fp32 operations that PyTorch lacks (fma) or gets wrong (sqrt)."""

import torch


def fma(a: torch.Tensor | float, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """Return `a * b + c` of fp32 values, rounded once to fp32 (nearest even), as hardware fma does.

    The product of two fp32 numbers is exact in float64. The float64 sum is corrected to round to
    odd with the exact error of the addition (TwoSum), after which rounding to fp32 cannot be a
    double rounding: 53 >= 2 * 24 + 2 (Boldo and Melquiond 2008).
    """
    product = _float64(a) * _float64(b)
    addend = _float64(c)
    total = product + addend
    kept = total - product
    error = (product - (total - kept)) + (addend - kept)
    bits = total.view(torch.int64)
    # The odd neighbour of an even sum lies on the side of the error; away from zero is + 1 in bits.
    step = torch.where((error > 0) == (total > 0), 1, -1)
    is_even_inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    return torch.where(is_even_inexact, bits + step, bits).view(torch.float64).to(torch.float32)


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """Return the square root of fp32 values, rounded once to fp32.

    On CPU `torch.sqrt` of fp32 is off by one ulp in 0.7 % of the cases. The root of an fp32 number
    is at least 2**-50 away (relatively) from a tie of fp32, so a float64 root within an ulp
    (2**-52) rounds to the right fp32 number.
    """
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def _float64(value: torch.Tensor | float) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
