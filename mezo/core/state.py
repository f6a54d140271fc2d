"""The adapter of a run on one rank: the fp32 master arena and the slots it is written to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from mezo._signals import uninterrupted
from mezo.core.init import initial_values
from mezo.core.messages import StepReply
from mezo.core.rounding import RoundingWatch
from mezo.core.rows import BASE, THETA, minus_slot, plus_slot, run_slots
from mezo_kernels import AdapterPlan, Direction, TensorSpec, add_directions_, perturb_into


@dataclass(frozen=True)
class AdapterSlot:
    """A place from which an engine's forward reads the adapter.

    Args:
        name: see `core.rows`.
        uid: the id under which the engine knows it; None for the base model.
        tensors: N views in the slots' dtype, in the order of the state's specs.
    """

    name: str
    uid: str | None
    tensors: Sequence[torch.Tensor]


_NO_ADAPTER = AdapterSlot(BASE, None, ())


# Above it a sum of updates could leave fp32: z is below 7, and a run has less than 2^24 steps.
MAX_COEFFICIENT = 2.0**100


def is_safe(coefficient: float) -> bool:
    """Whether an update leaves theta finite, however often it is repeated."""
    return abs(coefficient) <= MAX_COEFFICIENT  # False for NaN


class AdapterState:
    """fp32 masters of all adapter tensors of one rank, with their update and their slots.

    The masters lie in one flat buffer and are never perturbed. A step's update is kept back and
    fused with the next step's perturbation: one pass reads the master once, updates it and writes
    all perturbed slots. Engines get a slot from `slot` or name it to `sync`, which write theta's
    slot first where it is behind the masters. `pack` gives the masters with all updates.

    Args:
        specs: the N tensors of this rank.
        seed: the run's seed; theta_0 is a function of it.
        distribution: "gaussian" or "rademacher".
        slots: those of `run_slots`, in any order.
        device: where the masters live.

    Attributes:
        version: number of updates so far; tells theta from what it was before.
        steps: steps taken so far, skipped ones included; the number of the next one.
        last_reply: of the last step; None where it was an update whose coefficients were known.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        *,
        seed: int,
        distribution: str,
        slots: Sequence[AdapterSlot],
        device: torch.device | str = "cpu",
    ) -> None:
        self.specs = tuple(specs)
        self.seed = seed
        self.distribution = distribution
        self.num_directions = (len(slots) - 1) // 2
        self._slots = {slot.name: slot for slot in slots}
        assert sorted(self._slots) == sorted(run_slots(self.num_directions))
        size = sum(math.prod(spec.shape) for spec in self.specs)
        self.arena = torch.empty(size, dtype=torch.float32, device=device)
        self.masters = [master for _, master in self.unpack(self.specs, self.arena)]
        for master, spec in zip(self.masters, self.specs, strict=True):
            master.copy_(initial_values(spec, seed))
        pairs = [
            self._slots[name(k)].tensors
            for k in range(self.num_directions)
            for name in (plus_slot, minus_slot)
        ]
        theta = self._slots[THETA].tensors
        self._plan = AdapterPlan(self.masters, self.specs, pairs)
        self._theta_plan = AdapterPlan(self.masters, self.specs, [theta])
        self._rounding = RoundingWatch(self.specs, self.masters, *pairs[:2])
        self.slot_dtype = theta[0].dtype
        self._pending: tuple[list[Direction], list[float]] | None = None
        self._is_theta_current = False
        self.version = 0
        self.steps = 0
        self.last_reply: StepReply | None = None
        self._sync_theta()

    def slot(self, name: str) -> AdapterSlot:
        """Return a slot that holds what its name says.

        Args:
            name: one of `run_slots`, or `BASE` for the base model.

        Returns:
            The slot. theta's is up to date until the next update; a perturbed one holds what
            `perturb` has written last.

        Raises:
            ValueError: a run has no such slot.

        Cost: one pass over the masters where theta's slot was behind them, else nothing.
        """
        if name == BASE:
            return _NO_ADAPTER
        if name not in self._slots:
            raise ValueError(
                f"slot: name must be one of {[BASE, *self._slots]}, got {name!r}; score under a "
                "slot of the run."
            )
        if name == THETA:
            self._sync_theta()
        return self._slots[name]

    def sync(self, uids: Collection[str | None]) -> None:
        """Bring those slots up to date that a batch is about to read.

        Args:
            uids: ids of the adapters in the batch; those of other adapters are ignored.
        """
        for slot in self._slots.values():
            if slot.uid in uids:
                self.slot(slot.name)

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

    def take_step(
        self, step: int, coefficients: Sequence[float], reply: StepReply | None = None
    ) -> None:
        """Take a step: its update, if it has one, and its number.

        Args:
            step: number of the next step.
            coefficients: of its directions, or empty: a skipped step.
            reply: its reply, kept for a caller that was interrupted meanwhile.

        Raises:
            ValueError: another number, or see `defer_update`; nothing has changed then.
        """
        self.check_next(step)
        with uninterrupted():
            if coefficients:
                self.defer_update(step, coefficients)
            self.steps = step + 1
            self.last_reply = reply

    def take_steps(self, step: int, coefficients: Sequence[Sequence[float]]) -> None:
        """Take steps whose coefficients are known, all in one pass over the masters.

        Args:
            step: number of the next step, the first of them.
            coefficients: of each step's directions, or empty: a skipped step.

        Raises:
            ValueError: see `take_step`; nothing has changed then.
        """
        self.check_next(step)
        for values in coefficients:
            self._check_coefficients(values)
        self.flush()
        directions: list[Direction] = []
        factors: list[float] = []
        for number, values in enumerate(coefficients, start=step):
            directions += self.directions(number)[: len(values)]
            factors += values
        with uninterrupted():
            if factors:
                add_directions_(self._plan, directions=directions, coefficients=factors)
                self._is_theta_current = False
                self._rounding.moved(factors)
                self.version += 1
            self.steps = step + len(coefficients)
            self.last_reply = None

    def defer_update(self, step: int, coefficients: Sequence[float]) -> None:
        """Take theta <- fma(c, z, theta) over the directions of ``step``, to be applied later.

        Raises:
            ValueError: more coefficients than directions, or one above 2^100; nothing has changed
                then.
        """
        self._check_coefficients(coefficients)
        self.flush()
        self._pending = (self.directions(step)[: len(coefficients)], list(coefficients))
        self._is_theta_current = False
        self._rounding.moved(coefficients)
        self.version += 1

    def _check_coefficients(self, coefficients: Sequence[float]) -> None:
        """Raise ValueError for more of them than directions, or one above 2^100."""
        if len(coefficients) > self.num_directions:
            raise ValueError(
                f"defer_update: coefficients must be at most one per direction, "
                f"{self.num_directions}, got {len(coefficients)}; pass those of one step."
            )
        for c in coefficients:
            if not is_safe(c):
                raise ValueError(
                    f"defer_update: coefficients must be between -2^100 and 2^100, got {c!r}; "
                    "lower lr or raise eps."
                )

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put other values in the place of theta; the number of the next step stays.

        Args:
            weights: {canonical name: tensor of the global shape}, of all tensors and no others;
                rounded to fp32 where they are of another dtype.

        Raises:
            ValueError: a tensor too many or too few, of another shape, or with a value that is not
                finite in fp32; nothing has changed then.
        """
        names, found = {spec.name for spec in self.specs}, set(weights)
        if names != found:
            raise ValueError(
                f"set_weights: weights must be those of the {len(names)} tensors of the run, got "
                f"{len(found)} (unknown: {sorted(found - names)[:2]}, missing: "
                f"{sorted(names - found)[:2]}); use the target_modules of the run that made them."
            )
        values = []
        for spec in self.specs:
            whole = weights[spec.name].float()
            if tuple(whole.shape) != spec.global_shape or not bool(whole.isfinite().all()):
                what = "values that are not finite"
                if tuple(whole.shape) != spec.global_shape:
                    what = f"the shape {tuple(whole.shape)}"
                raise ValueError(
                    f"set_weights: {spec.name} must be finite in fp32 and of shape "
                    f"{spec.global_shape}, got {what}; use the rank and the base model of the run "
                    "that made it."
                )
            rows, columns = spec.shape
            values.append(whole[spec.row0 :, spec.col0 :][:rows, :columns])
        with uninterrupted():
            self._pending = None
            for master, value in zip(self.masters, values, strict=True):
                master.copy_(value)
            self._is_theta_current = False
            self._rounding.forget()
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

    def show(self, step: int, index: int, scale: float) -> None:
        """Write theta + scale z of one direction into theta's slot, for checks, until `restore`."""
        self.flush()
        perturb_into(self._theta_plan, directions=[self.directions(step)[index]], scales=[scale])
        self._is_theta_current = True  # so that nobody who asks for the slot writes theta there

    def restore(self) -> None:
        """Undo `show`: the next to ask for theta's slot gets theta."""
        self._is_theta_current = False

    def _sync_theta(self) -> None:
        """Bring theta's slot up to date; does nothing when it is."""
        if self._is_theta_current:
            return
        self.flush()
        zero = [Direction(self.seed, 0, 0, self.distribution)]
        perturb_into(self._theta_plan, directions=zero, scales=[0.0])
        self._is_theta_current = True
