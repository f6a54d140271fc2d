"""The numbers of `prefix_bias` on values that are known."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mezo.diagnostics.prefix_bias import compare


def test_against_torch():
    rng = random.Random(0)
    exact = [rng.gauss(0, 1) for _ in range(30)]
    detached = [0.4 * e + rng.gauss(0, 0.3) for e in exact]
    d, e = (torch.tensor(v, dtype=torch.float64) for v in (detached, exact))
    bias = compare(detached, exact)
    assert bias.cosine == pytest.approx((d @ e / (d.norm() * e.norm())).item())
    assert bias.correlation == pytest.approx(torch.corrcoef(torch.stack([d, e]))[0, 1].item())
    assert bias.relative_error == pytest.approx(((d - e).norm() / e.norm()).item())


def test_equal_and_degenerate_lists():
    same = compare([1.0, -2.0], [1.0, -2.0])
    assert (same.cosine, same.relative_error) == (pytest.approx(1.0), 0.0)
    assert math.isnan(compare([1.0], [2.0]).correlation)
    assert math.isnan(compare([0.0, 0.0], [0.0, 0.0]).cosine)
