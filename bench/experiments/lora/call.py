"""What a call of perturbed_lora asks for, and its copies as a GPU kernel expects them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from mezo_kernels.directions.cpu import slot_tables
from mezo_kernels.directions.philox import Direction, TensorSpec
from mezo_kernels.directions.scalars import Scalars, scalars_of, sent


@dataclass(frozen=True)
class LoraCall:
    """The checked arguments of `perturbed_lora`, none of its sizes 0; the result goes to ``y``."""

    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    a_spec: TensorSpec
    b_spec: TensorSpec
    directions: tuple[Direction, ...]
    scales: tuple[float, ...]
    row_indptr: tuple[int, ...]
    scaling: float
    y: torch.Tensor
    is_added: bool

    def pairs(self) -> list[tuple[int, ...]]:
        """Rows LoraPair of bench/experiments/csrc/lora.h: copies of one direction, two at a time.

        (direction or -1 for none, scales of both copies, their first rows, the ends of their rows,
        0): a single copy has a second one without rows.
        """
        _, indices, _ = slot_tables(self.directions, self.scales)
        by_direction: dict[int, list[tuple[int, int, int]]] = {}
        for k, (index, (first, last)) in enumerate(
            zip(indices.tolist(), pairwise(self.row_indptr), strict=True)
        ):
            if first < last:
                by_direction.setdefault(index, []).append((k, first, last))
        pairs: list[tuple[int, ...]] = []
        for index, copies in by_direction.items():
            for i in range(0, len(copies), 2):
                one = copies[i]
                other = copies[i + 1] if i + 1 < len(copies) else (one[0], 0, 0)
                pairs.append((index, one[0], other[0], one[1], other[1], one[2], other[2], 0))
        return pairs

    def on_device(self) -> DeviceCall:
        """The call with its tables on its device: what a kernel needs, ready to be captured."""
        pairs = self.pairs()
        return DeviceCall(
            self,
            scalars_of(self.x.device, self.directions, self.scales),
            sent(torch.tensor(pairs, dtype=torch.int32), self.x.device),
            max(max(pair[5] - pair[3], pair[6] - pair[4]) for pair in pairs),
            any(pair[4] < pair[6] for pair in pairs),
        )


@dataclass(frozen=True)
class DeviceCall:
    """A call and its tables.

    Args:
        call: the call.
        scalars: its directions and scales.
        pairs: `[P, 8]` int32, the LoraPair of bench/experiments/csrc/lora.h.
        max_rows: the most rows of one copy.
        has_second: whether any pair has rows of a second copy.
    """

    call: LoraCall
    scalars: Scalars
    pairs: torch.Tensor
    max_rows: int
    has_second: bool
