"""DeviceStep: the scalars of MeZO steps in the memory of the device that runs them.

With it a whole step, losses to update, can be captured in a CUDA graph. It stays here until the
worker captures its steps.
"""

from __future__ import annotations

import math

import torch

from bench.experiments import _native
from mezo_kernels.backends import load, resolve
from mezo_kernels.directions import ON_DEVICE
from mezo_kernels.directions.cpu import Update, direction_table
from mezo_kernels.directions.philox import DOMAINS, MASK32, Direction
from mezo_kernels.directions.plan import AdapterPlan
from mezo_kernels.directions.scalars import Scalars

_FP32 = torch.finfo(torch.float32)
_DISTRIBUTIONS = {domain: name for name, domain in DOMAINS.items()}


class DeviceStep:
    """The scalars of MeZO steps, kept and advanced on the device, so that a step can be captured.

        g_k <- clip((losses[0, k] - losses[1, k]) / (2 eps));   c_k <- -lr g_k / n
        theta <- fma(c_k, z_{step, k}, theta), in the order of k, at the next call

    A step is: ``perturb()``, forward passes that write ``losses``, ``advance_()``. The three
    capture into one CUDA graph whose replays draw new directions. The update that `advance_` leaves
    behind is applied by the next `perturb` or, to read theta, by `apply_update_`. Either call uses
    it up: a second one applies nothing.

    Args:
        plan: the tensors, with a plus and a minus slot for each direction, in the order plus 0,
            minus 0, plus 1, minus 1, ...
        seed: the run's seed, 0 .. 2**64 - 1.
        num_directions: n, directions averaged in a step, >= 1.
        distribution: "gaussian" | "rademacher".
        lr: learning rate, finite.
        eps: perturbation scale, > 0 and normal in fp32.
        clip: bound on abs(projected_grad), > 0, or None.
        step: the first step, 0 .. 2**32 - 1.

    Attributes:
        losses: `[2, n]` float64 on the device, plus losses then minus losses; the caller writes it.
        projected_grads: `[n]` float64 on the device, (clipped) estimates of the last `advance_`;
            not finite where a loss is not.
        coefficients: `[n]` fp32 on the device, those of the last `advance_`.
        step: 0-dim int64 on the device, the step that the next `perturb` draws.

    Raises:
        ValueError: a plan with another number of slots, or a value outside its range.

    Numerics: losses to coefficients in float64, the operations of `mezo.optim` in their order,
    then one rounding to fp32; the same bits on every backend. A step whose losses are not all
    finite, or whose coefficients are not all finite in fp32, leaves no update.
    Graph-safe: yes, after one call outside of a capture. Cost: one launch of one block per step.
    Source: Malladi et al. 2023 (arXiv 2305.17333), Algorithms 1 and 2.
    """

    def __init__(
        self,
        plan: AdapterPlan,
        *,
        seed: int,
        num_directions: int = 1,
        distribution: str = "gaussian",
        lr: float,
        eps: float,
        clip: float | None = None,
        step: int = 0,
    ) -> None:
        num_slots = len(plan.outputs or ())
        if num_directions < 1 or num_slots != 2 * num_directions:
            raise ValueError(
                "DeviceStep: num_directions must be at least 1 and half the plan's slots, got "
                f"{num_directions} for {num_slots} slots; give the plan a plus and a minus slot "
                "for each direction."
            )
        self.plan = plan
        self.num_directions = num_directions
        self.device = plan.device
        now = [Direction(seed, step, k, distribution) for k in range(num_directions)]
        zeros = torch.zeros(num_directions, dtype=torch.float64)
        self.scalars = Scalars(
            directions=direction_table([*now, *now]).to(self.device),
            factors=torch.zeros(3 * num_directions, dtype=torch.float32, device=self.device),
            num_updates=torch.zeros(1, dtype=torch.int32, device=self.device),
            max_updates=num_directions,
            indices=tuple(k for k in range(num_directions) for _ in (0, 1)),
            domain=DOMAINS[distribution],
            key=seed,
        )
        self.losses = torch.stack((zeros, zeros)).to(self.device)
        self.projected_grads = zeros.to(self.device)
        self.coefficients = self.scalars.factors[:num_directions]
        self.step = self.scalars.directions[num_directions, 2]
        # lr, eps, clip
        self._settings = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._settings[2] = math.inf
        self.set(lr=lr, eps=eps)
        if clip is not None:
            self.set(clip=clip)

    def set(
        self, *, lr: float | None = None, eps: float | None = None, clip: float | None = None
    ) -> None:
        """Change settings on the device, in the order of the stream; None leaves one as it is.

        Args:
            lr: learning rate of the next `advance_`.
            eps: scale of the next `perturb` and of the `advance_` after it; set it between an
                `advance_` and the next `perturb`.
            clip: bound of the next `advance_`; ``math.inf`` for none.

        Raises:
            ValueError: a value outside its range; nothing has changed then.

        Graph-safe: yes; outside of a graph it holds for later replays. Cost: a launch per setting.
        """
        if lr is not None and not math.isfinite(lr):
            raise ValueError(f"DeviceStep: lr must be finite, got {lr!r}; pass a rate like 1e-4.")
        if eps is not None and not _FP32.tiny <= eps <= _FP32.max:
            raise ValueError(
                f"DeviceStep: eps must be > 0 and a normal fp32 number, got {eps!r}; pass a scale "
                "like 1e-3."
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"DeviceStep: clip must be > 0, got {clip!r}; pass math.inf for none.")
        for i, value in enumerate((lr, eps, clip)):
            if value is not None:
                self._settings[i].fill_(value)
        if eps is not None:
            scales = self.scalars.factors[self.num_directions :]
            scales[0::2].fill_(eps)
            scales[1::2].fill_(-eps)

    def perturb(self, *, backend: str | None = None) -> None:
        """Apply the pending update to the masters, then write the slots of this step.

        Args:
            backend: "reference" | "cpu" | "triton" | "cuda" | None (the best one for the device).

        Raises:
            ValueError: an unknown backend name.
            RuntimeError: the requested backend is not usable here, with the reason.

        Numerics, Graph-safe and Cost: those of `perturb_into` and of the class.
        """
        name = resolve("perturb_into", backend, self.device.type)
        module = load("perturb_into", name)
        if name in ON_DEVICE:
            module.perturb_scalars(self.plan, self.scalars)
        else:
            module.perturb_into(self.plan, *on_host(self.scalars))
        # Behind the kernels on their stream: the update counts once.
        self.scalars.num_updates.zero_()

    def apply_update_(self, *, backend: str | None = None) -> None:
        """Apply the pending update to the masters, so that they are theta.

        Args:
            backend: as for `perturb`.

        Raises:
            ValueError, RuntimeError: as `perturb`.

        Numerics, Graph-safe and Cost: those of `add_directions_` and of the class.
        """
        name = resolve("add_directions_", backend, self.device.type)
        module = load("add_directions_", name)
        if name in ON_DEVICE:
            module.add_scalars_(self.plan, self.scalars)
        else:
            _, _, update = on_host(self.scalars)
            module.add_directions_(self.plan, *update)
        self.scalars.num_updates.zero_()

    def advance_(self) -> None:
        """Turn the losses into the update of this step, and move on to the next step.

        Numerics, Graph-safe and Cost: those of the class.
        """
        module = _native.C
        buffers = (
            self.scalars.directions,
            self.scalars.factors,
            self.scalars.num_updates,
            self.projected_grads,
            self.losses,
            self._settings,
        )
        state = (*(buffer.data_ptr() for buffer in buffers), self.num_directions)
        if self.device.type == "cpu" and module is not None:
            module.cpu_advance(state)
        elif self.device.type == "cuda" and hasattr(module, "cuda_advance"):
            assert module is not None
            stream = torch.cuda.current_stream(self.device)
            module.cuda_advance(state, stream.device_index, stream.cuda_stream)
        else:
            self._advance_in_torch()

    def _advance_in_torch(self) -> None:
        """bench/experiments/csrc/step.h, for hosts without the native module."""
        n = self.num_directions
        lr, eps, clip = self._settings.unbind()
        plus, minus = self.losses.unbind()
        grads = (plus - minus) / (2.0 * eps)
        grads = torch.where(grads > clip, clip, torch.where(grads < -clip, -clip, grads))
        coefficients = -lr * grads / n
        is_applied = self.losses.isfinite().all() & (coefficients.abs() <= _FP32.max).all()
        self.projected_grads.copy_(grads)
        self.coefficients.copy_(coefficients)
        self.scalars.num_updates.copy_((is_applied * n).to(torch.int32))
        directions = self.scalars.directions
        directions[:n].copy_(directions[n:])
        directions[n:, 2].add_(1).bitwise_and_(MASK32)


def on_host(scalars: Scalars) -> tuple[list[Direction], list[float], Update]:
    """(directions of the slots, their scales, update), as the calls expect them.

    Waits for the device where the scalars lie on one.
    """
    rows = [_direction_of_row(row) for row in scalars.directions.tolist()]
    factors: list[float] = scalars.factors.tolist()
    first = scalars.max_updates
    count = int(scalars.num_updates.item())
    # A slot without a direction is a plain copy, which the calls spell as a scale of 0.
    slots = [(rows[first + max(index, 0)], index >= 0) for index in scalars.indices]
    scales = [
        factor if is_perturbed else 0.0
        for factor, (_, is_perturbed) in zip(factors[first:], slots, strict=True)
    ]
    return [direction for direction, _ in slots], scales, (rows[:count], factors[:count])


def _direction_of_row(row: list[int]) -> Direction:
    low, high, step, tail = row
    domain, index = tail >> 24, tail & ((1 << 24) - 1)
    return Direction(low & MASK32 | high << 32, step, index, _DISTRIBUTIONS[domain])
