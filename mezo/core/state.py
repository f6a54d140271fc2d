"""The adapter of a run on one rank: the fp32 master arena and the slots it is written to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mezo._signals import uninterrupted
from mezo.core.init import initial_values
from mezo.core.rounding import RoundingWatch
from mezo_kernels import AdapterPlan, Direction, TensorSpec, add_directions_, perturb_into

Slot = Sequence[torch.Tensor]


def is_fp32(value: float) -> bool:
    """Whether a number is finite once it is rounded to fp32."""
    return abs(value) <= torch.finfo(torch.float32).max  # False for NaN


class AdapterState:
    """fp32 masters of all adapter tensors of one rank, with their update and their slots.

    The masters lie in one flat buffer and are never perturbed. A step's update is kept back and
    fused with the next step's perturbation: one pass reads the master once, updates it and writes
    all perturbed slots. Whatever reads the weights calls `flush` or `publish` first.

    Args:
        specs: the N tensors of this rank.
        seed: the run's seed; theta_0 is a function of it.
        distribution: "gaussian" or "rademacher".
        pairs: for each direction the plus and the minus slot, N views each, in the slots' dtype.
        theta: the slot for the unperturbed adapter, N views.
        device: where the masters live.

    Attributes:
        steps: steps taken so far, skipped ones included; the number of the next one.
        last_reply: of the last step; None where it was an update whose coefficients were known.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        *,
        seed: int,
        distribution: str,
        pairs: Sequence[tuple[Slot, Slot]],
        theta: Slot,
        device: torch.device | str = "cpu",
    ) -> None:
        self.specs = tuple(specs)
        self.seed = seed
        self.distribution = distribution
        self.num_directions = len(pairs)
        size = sum(math.prod(spec.shape) for spec in self.specs)
        self.arena = torch.empty(size, dtype=torch.float32, device=device)
        self.masters = [master for _, master in self.unpack(self.specs, self.arena)]
        for master, spec in zip(self.masters, self.specs, strict=True):
            master.copy_(initial_values(spec, seed))
        slots = [slot for pair in pairs for slot in pair]
        self._plan = AdapterPlan(self.masters, self.specs, slots)
        self._rounding = RoundingWatch(self.specs, self.masters, *pairs[0])
        self.slot_dtype = pairs[0][0][0].dtype
        self._theta_plan = AdapterPlan(self.masters, self.specs, [theta])
        self.slot_dtype = theta[0].dtype
        self._pending: tuple[list[Direction], list[float]] | None = None
        self._is_theta_current = False
        self.version = 0
        self.steps = 0
        self.last_reply: Any = None

    def directions(self, step: int) -> list[Direction]:
        """The directions of ``step``, in order."""
        return [
            Direction(self.seed, step, index, self.distribution)
            for index in range(self.num_directions)
        ]

    def perturb(self, step: int, eps: float) -> None:
        """Write theta + eps z and theta - eps z of every direction of ``step`` into the slots.

        An update that was kept back is applied in the same pass.
        """
        directions = [d for d in self.directions(step) for _ in (0, 1)]
        scales = [eps, -eps] * self.num_directions
        with uninterrupted():
            perturb_into(self._plan, directions=directions, scales=scales, update=self._pending)
            self._pending = None

    def check_next(self, step: int) -> None:
        """Raise ValueError unless ``step`` is the number of the next step: each is taken once."""
        if step != self.steps:
            raise ValueError(
                f"step: number must be that of the next step, {self.steps}, got {step}; take steps "
                "in order and each once, or measure without an update."
            )

    def take_step(self, step: int, coefficients: Sequence[float], reply: Any = None) -> None:
        """Take a step: its update, if it has one, and its number.

        Args:
            step: number of the next step.
            coefficients: of its directions, or empty: a skipped step.
            reply: what is said of it, kept for a caller that was interrupted meanwhile.

        Raises:
            ValueError: another number, or see `defer_update`; nothing has changed then.
        """
        self.check_next(step)
        with uninterrupted():
            if coefficients:
                self.defer_update(step, coefficients)
            self.steps = step + 1
            self.last_reply = reply

    def defer_update(self, step: int, coefficients: Sequence[float]) -> None:
        """Take theta <- fma(c, z, theta) over the directions of ``step``, to be applied later.

        Raises:
            ValueError: a coefficient that is not finite in fp32; nothing has changed then.
        """
        for c in coefficients:
            if not is_fp32(c):
                raise ValueError(
                    f"defer_update: coefficients must be finite in fp32, got {c!r}; lower lr or "
                    "raise eps."
                )
        self.flush()
        self._pending = (self.directions(step)[: len(coefficients)], list(coefficients))
        self._is_theta_current = False
        self._rounding.moved(coefficients)
        self.version += 1

    def flush(self) -> None:
        """Apply the update that was kept back, if there is one."""
        if self._pending is not None:
            directions, coefficients = self._pending
            with uninterrupted():
                add_directions_(self._plan, directions=directions, coefficients=coefficients)
                self._pending = None

    def pack(self) -> tuple[tuple[TensorSpec, ...], torch.Tensor]:
        """Return the places of the tensors and their values, one flat fp32 tensor on the CPU.

        To be sent: a master is a view of the arena, and pickling it would take the whole arena
        along, once for each tensor.
        """
        self.flush()
        return self.specs, self.arena.cpu()

    @staticmethod
    def unpack(
        specs: Sequence[TensorSpec], arena: torch.Tensor
    ) -> list[tuple[TensorSpec, torch.Tensor]]:
        """Undo `pack`: (place, values) of each tensor."""
        parts = arena.split([math.prod(spec.shape) for spec in specs])
        return [(s, part.view(s.shape)) for s, part in zip(specs, parts, strict=True)]

    def lost_share(self, eps: float) -> float | None:
        """Return the share of elements whose perturbation by ``eps`` rounding has removed.

        See `RoundingWatch.share`; to be called when the slots hold that perturbation.
        """
        return self._rounding.share(eps)

    def publish(self) -> None:
        """Bring the theta slot up to date; does nothing when it is."""
        if self._is_theta_current:
            return
        self.flush()
        zero = [Direction(self.seed, 0, 0, self.distribution)]
        perturb_into(self._theta_plan, directions=zero, scales=[0.0])
        self._is_theta_current = True

    def show(self, step: int, index: int, scale: float) -> None:
        """Write theta + scale z of one direction into theta's slot, for checks, until `restore`."""
        self.flush()
        perturb_into(self._theta_plan, directions=[self.directions(step)[index]], scales=[scale])
        self._is_theta_current = True  # a batch that reads the slot is to leave it so

    def restore(self) -> None:
        """Undo `show`: the next that reads theta's slot brings it up to date."""
        self._is_theta_current = False
