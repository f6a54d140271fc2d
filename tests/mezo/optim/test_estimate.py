"""The estimator on a quadratic whose gradient is known, and the scalar rules around it."""

from __future__ import annotations

import math

import pytest
import torch

from mezo.optim.estimate import (
    clip_projected_grad,
    projected_grad,
)
from mezo.optim.sgd import update_coefficient
from mezo_kernels import Direction, TensorSpec, sample

SHAPE = (6, 10)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_mean_of_g_z_is_the_gradient_of_a_quadratic(distribution):
    torch.manual_seed(0)
    d, n, eps = SHAPE[0] * SHAPE[1], 2000, 1e-2
    root = torch.randn(d, d, dtype=torch.float64)
    hessian, offset = root @ root.T / d, torch.randn(d, dtype=torch.float64)
    theta = torch.randn(d, dtype=torch.float64)

    def loss(x):
        return 0.5 * x @ hessian @ x + offset @ x

    gradient = hessian @ theta + offset
    spec = TensorSpec("model.layers.0.mlp.up_proj.lora_A", SHAPE)
    estimates = []
    for step in range(n):
        z = sample(spec, Direction(3, step, 0, distribution)).double().reshape(-1)
        g = projected_grad(loss(theta + eps * z).item(), loss(theta - eps * z).item(), eps)
        # A two-point difference of a quadratic is exact.
        assert g == pytest.approx((gradient @ z).item(), rel=1e-9, abs=1e-9)
        estimates.append(g * z)
    estimates = torch.stack(estimates)
    mean, error = estimates.mean(0), estimates.std(0) / math.sqrt(n)
    # 60 components, 5 standard errors: fails by chance about once in 30,000 seeds.
    assert ((mean - gradient).abs() < 5 * error).all()
    # E |mean - gradient|^2 = |gradient|^2 (d + 1) / n for a Gaussian, (d - 1) / n for signs.
    relative = (mean - gradient).norm() / gradient.norm()
    assert relative == pytest.approx(math.sqrt(d / n), rel=0.4)
    cosine = mean @ gradient / (mean.norm() * gradient.norm())
    assert cosine > 0.97


def test_scalars():
    assert projected_grad(1.5, 1.0, 0.25) == 1.0
    assert clip_projected_grad(-7.0, 3.0) == -3.0
    assert clip_projected_grad(2.0, 3.0) == 2.0
    assert clip_projected_grad(-7.0, None) == -7.0
    assert update_coefficient(2.0, 0.5, 4) == -0.25
