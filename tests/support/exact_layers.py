"""Layers between a model's products, from their definitions, in float64."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`[..., D]`."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`[T, H * D]`, each head's halves the coordinates of points; cos and sin `[T, D / 2]`."""
    heads = x.double().unflatten(-1, (-1, 2 * cos.shape[-1]))
    turn = torch.complex(cos.double(), sin.double())[:, None]
    turned = torch.complex(*heads.chunk(2, -1)) * turn
    return torch.cat((turned.real, turned.imag), -1).flatten(1)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`[T, 2 * D]` -> `[T, D]`."""
    gate, up = x.double().chunk(2, -1)
    return gate * torch.special.expit(gate) * up
