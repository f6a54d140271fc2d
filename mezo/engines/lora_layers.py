"""The linear layers of a Hugging Face model, wrapped so that adapter slots act on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mezo.config import MeZOConfig
from mezo.engines.linears import STACKED, linear_shape


class LoraLinear(torch.nn.Module):
    """A linear layer with one adapter slot switched on at a time (or none: the base model)."""

    def __init__(self, base: torch.nn.Linear, config: MeZOConfig, slots: Sequence[str]) -> None:
        super().__init__()
        self.base = base
        self.scaling = config.scaling
        # Ids of the slots that all tokens, and that prefix tokens, run under; None: base model.
        self.active: str | None = None
        self.prefix: str | None = None
        self.is_prefix: torch.Tensor | None = None  # [N, T, 1] bool, or None: no prefixes
        shapes = {"A": (config.rank, base.in_features), "B": (base.out_features, config.rank)}
        self.slots = {
            slot: {
                factor: torch.zeros(shape, dtype=base.weight.dtype, device=base.weight.device)
                for factor, shape in shapes.items()
            }
            for slot in slots
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D_in] -> [..., D_out]."""
        y: torch.Tensor = self.base(x)
        if self.is_prefix is None:
            return y + self._delta(x, self.active)
        return y + torch.where(
            self.is_prefix, self._delta(x, self.prefix), self._delta(x, self.active)
        )

    def _delta(self, x: torch.Tensor, uid: str | None) -> torch.Tensor:
        """The adapter's part of the output; nothing for the base model."""
        if uid is None:
            return torch.zeros((), dtype=x.dtype, device=x.device)
        slot = self.slots[uid]
        return F.linear(F.linear(x, slot["A"]), slot["B"]) * self.scaling


def partners_of(
    model: torch.nn.Module, layers: Iterable[str], rank: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of what adapted layers lack of the projections that serving engines fuse."""
    modules = dict(model.named_modules())
    partners: dict[str, tuple[int, ...]] = {}
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        for piece in next((group for group in STACKED.values() if leaf in group), ()):
            module = modules.get(f"{parent}.{piece}")
            if isinstance(module, torch.nn.Linear):  # adapted ones are wrapped by now
                partners[f"{parent}.{piece}.lora_A"] = (rank, module.in_features)
                partners[f"{parent}.{piece}.lora_B"] = (module.out_features, rank)
    return partners


def wrap(model: Any, config: MeZOConfig, slots: Sequence[str]) -> dict[str, LoraLinear]:
    """Replace the target modules by adapted ones; returns them in the model's order."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in config.target_modules
    }
    known = {name.rsplit(".", 1)[-1] for name in found}
    wrong = sorted(set(config.target_modules) - known)
    if wrong:
        modules = model.named_modules()
        linears = {n.rsplit(".", 1)[-1] for n, m in modules if isinstance(m, torch.nn.Linear)}
        raise ValueError(
            f"attach: target_modules must name linear layers of the model, got {wrong}; "
            f"it has {sorted(linears - {'lm_head'})}."
        )
    for name, module in found.items():
        if linear_shape(module) is not None and not isinstance(module, torch.nn.Linear):
            raise ValueError(
                f"attach: {name} must be a torch.nn.Linear, got {type(module).__name__} (GPT-2's "
                "transposed linear layer), which MeZO does not train; choose a model whose layers "
                "are torch.nn.Linear."
            )
        if not isinstance(module, torch.nn.Linear):
            raise ValueError(
                f"attach: {name} must be a linear layer, got {type(module).__name__}; "
                "detach the adapter that is already on the model, or choose other target_modules."
            )
    layers = {name: LoraLinear(module, config, slots) for name, module in found.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers
