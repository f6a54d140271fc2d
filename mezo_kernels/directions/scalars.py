"""The scalars of one call, in the memory of the device that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mezo_kernels.directions.cpu import Update, direction_table, slot_tables
from mezo_kernels.directions.philox import DOMAINS, Direction


@dataclass(frozen=True)
class Scalars:
    """Everything that changes from call to call; a GPU kernel reads it from device memory.

    Args:
        directions: `[J + D, 4]` int64, the DirectionRow of csrc/table.h: first the J directions of
            the update, then the D distinct ones of the slots.
        factors: `[J + K]` fp32, the update's coefficients, then the slots' scales.
        num_updates: `[1]` int32: how many directions of the update count, J or 0.
        max_updates: J.
        indices: for each slot which of the D directions it has, or -1: none, a plain copy.
        domain: the domain (`DOMAINS`) of all directions, or None where they differ.
        key: the seed of all directions, or None where they differ.
    """

    directions: torch.Tensor
    factors: torch.Tensor
    num_updates: torch.Tensor
    max_updates: int
    indices: tuple[int, ...]
    domain: int | None
    key: int | None

    @property
    def num_directions(self) -> int:
        """D, the distinct directions of the slots."""
        return len(self.directions) - self.max_updates


def scalars_of(
    device: torch.device,
    directions: Sequence[Direction] = (),
    scales: Sequence[float] = (),
    update: Update = ((), ()),
) -> Scalars:
    """Put the scalars of a call on its device."""
    distinct, indices, _ = slot_tables(directions, scales)
    rows = [*update[0], *distinct]
    domains = {DOMAINS[row.distribution] for row in rows}
    keys = {row.seed for row in rows}
    return Scalars(
        directions=sent(direction_table(rows).reshape(len(rows), 4), device),
        factors=sent(torch.tensor([*update[1], *scales], dtype=torch.float32), device),
        num_updates=sent(torch.tensor([len(update[0])], dtype=torch.int32), device),
        max_updates=len(update[0]),
        indices=tuple(indices.tolist()),
        domain=domains.pop() if len(domains) == 1 else None,
        key=keys.pop() if len(keys) == 1 else None,
    )


def sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The table on a device; the host does not wait for a GPU's stream."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)
