"""How much of a perturbation survives rounding to the slots' dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mezo_kernels import TensorSpec

# Above this share of lost elements the variance that rounding adds to a factor's perturbation is
# more than a third of the perturbation's own: half are lost where a unit in the last place is about
# 3 eps, and rounding then adds ulp^2 / 6 to (2 eps)^2.
LOST_LIMIT = 0.5


class RoundingWatch:
    """Counts the elements that a plus and a minus slot have in common, when that can have changed.

    An element is lost where round(theta + eps z) == round(theta - eps z): the pair says nothing
    about it, but the update moves it. The share depends on theta and eps up to a factor of 2 only
    weakly, so the slots are read once for each binade of eps, and again when theta has doubled.

    Args:
        specs: N tensors; names end in ``lora_A`` or ``lora_B``.
        masters: theta, N fp32 tensors.
        plus: N views of the first direction's plus slot.
        minus: N views of its minus slot.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        masters: Sequence[torch.Tensor],
        plus: Sequence[torch.Tensor],
        minus: Sequence[torch.Tensor],
    ) -> None:
        self._factors: dict[str, list[int]] = {}
        for i, spec in enumerate(specs):
            self._factors.setdefault(spec.name.rsplit(".", 1)[-1], []).append(i)
        self._masters, self._plus, self._minus = masters, plus, minus
        self._shares: dict[int, float] = {}  # of each binade of eps, at about this theta
        self._mean_squares: list[float] = []  # of each factor, when theta was last read
        self._moved = 0.0  # mean square of what updates added to theta since then
        self.counts = 0

    def moved(self, coefficients: Sequence[float]) -> None:
        """Take note of an update theta <- fma(c, z, theta).

        Directions are independent, so the mean square of theta grows by c^2 with each.
        """
        self._moved += math.fsum(c * c for c in coefficients)

    def forget(self) -> None:
        """Take note that theta is another one now."""
        self._shares.clear()

    def share(self, eps: float) -> float | None:
        """Return the larger of lora_A's and lora_B's shares of lost elements; None at eps 0.

        To be called when the slots hold the pair of ``eps``.

        Cost: two comparisons, unless theta or eps have changed by a factor of 2; then one reading
        of both slots.
        """
        if eps == 0.0:
            return None
        if self._moved > 0.0 and any(self._moved >= 3.0 * ms for ms in self._mean_squares):
            self._shares.clear()
        binade = math.frexp(eps)[1]
        if binade not in self._shares:
            if not self._shares:
                self._read_theta()
            self._shares[binade] = self._count()
        return self._shares[binade]

    def _read_theta(self) -> None:
        """Remember how large theta is now."""
        self._moved = 0.0
        self._mean_squares = []
        for indices in self._factors.values():
            squares = sum(torch.linalg.vector_norm(self._masters[i]).square() for i in indices)
            self._mean_squares.append(float(squares) / self._size(indices))

    def _count(self) -> float:
        """The largest share of lost elements of a factor."""
        self.counts += 1
        return max(
            int(sum(torch.count_nonzero(self._plus[i] == self._minus[i]) for i in indices))
            / self._size(indices)
            for indices in self._factors.values()
        )

    def _size(self, indices: Sequence[int]) -> int:
        """Elements of the tensors at ``indices``."""
        return sum(self._masters[i].numel() for i in indices)
