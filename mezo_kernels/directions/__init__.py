"""Random directions: draw one, add a combination of them in place, fan a master out to slots."""

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from mezo_kernels.backends import EVERY_BACKEND, load, register, resolve
from mezo_kernels.directions.philox import Direction, TensorSpec
from mezo_kernels.directions.plan import AdapterPlan
from mezo_kernels.directions.scalars import Scalars, scalars_of


class _Backend(Protocol):
    def sample(
        self, spec: TensorSpec, direction: Direction, device: torch.device
    ) -> torch.Tensor: ...


class _HostBackend(_Backend, Protocol):
    """A backend that gets the scalars of a call as Python numbers."""

    def add_directions_(
        self, plan: AdapterPlan, directions: Sequence[Direction], coefficients: Sequence[float]
    ) -> None: ...

    def perturb_into(
        self,
        plan: AdapterPlan,
        directions: Sequence[Direction],
        scales: Sequence[float],
        update: tuple[Sequence[Direction], Sequence[float]],
    ) -> None: ...


class _DeviceBackend(_Backend, Protocol):
    """A backend that reads the scalars of a call from device memory."""

    def add_scalars_(self, plan: AdapterPlan, scalars: Scalars) -> None: ...

    def perturb_scalars(self, plan: AdapterPlan, scalars: Scalars) -> None: ...


register("sample", "add_directions_", "perturb_into", needs=EVERY_BACKEND, package=__name__)
# These read the scalars of a call from device memory.
ON_DEVICE = ("triton", "cuda")


def sample(
    spec: TensorSpec,
    direction: Direction,
    *,
    backend: str | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw one direction of one tensor: the z that the other calls use, to look at and to test.

        z[i, j] = normal(seed, step, index, uid, e),  e = (row0 + i) * global_cols + col0 + j

    Args:
        spec: the tensor, or the shard of one.
        direction: which z.
        backend: "reference" | "cpu" | "triton" | "cuda" | None (the best usable one).
        device: where z goes; None is the CPU.

    Returns:
        `[rows, cols]` fp32, contiguous; the caller owns it.

    Raises:
        ValueError: an unknown backend name.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: abs(z) <= 6.77, within 4 ulp of float64 Box-Muller. Deterministic; the same bits on
    every backend. Graph-safe: no, it allocates. Cost: one write of z.
    Source: Salmon et al. 2011 for Philox; Box and Muller 1958.

    Example:
        >>> sample(TensorSpec("q_proj.lora_A", (2, 3)), Direction(seed=7, step=0))
        tensor([[-0.2351,  0.4154,  1.7065],
                [ 0.1583, -0.2114,  0.9261]])
    """
    target = torch.device("cpu" if device is None else device)
    return _module(resolve("sample", backend, target.type)).sample(spec, direction, target)


def add_directions_(
    tensors: Sequence[torch.Tensor] | AdapterPlan,
    specs: Sequence[TensorSpec] | None = None,
    directions: Sequence[Direction] = (),
    coefficients: Sequence[float] = (),
    *,
    backend: str | None = None,
) -> None:
    """Add a combination of random directions to adapter tensors in place, all in one call.

        tensor_i <- fma(c_{K-1}, z_{K-1}, ... fma(c_0, z_0, tensor_i)),   z_k ~ N(0, 1)

    Args:
        tensors: N tensors `[rows_i, cols_i]`, fp32 | fp16 | bf16, one device, last dim contiguous;
            views of a pool slot are fine. Or an `AdapterPlan`, whose masters are meant.
        specs: N `TensorSpec`, the logical place of each tensor; None with a plan.
        directions: K `Direction`, applied in this order.
        coefficients: K finite floats in the unit of the tensors, rounded to fp32 once. A MeZO
            update is -lr * projected_grad.
        backend: "reference" | "cpu" | "triton" | "cuda" | None (the best one for the device).

    Returns:
        None; ``tensors`` are written in place, unseen by autograd.

    Raises:
        ValueError: what `AdapterPlan` raises, specs beside a plan, lengths that do not match, a
            coefficient that is not finite in fp32, or an unknown backend name.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: z and the sum in fp32, one rounding (nearest even) to each tensor's dtype.
    Deterministic; the same bits on every backend, whatever the number of threads.
    Graph-safe: no, each call sends its scalars. Cost: each element is read and written once,
    whatever K.
    Source: Malladi et al. 2023 (arXiv 2305.17333), Alg. 1; Salmon et al. 2011 for Philox.

    Example:
        >>> import torch
        >>> theta, spec = torch.zeros(2, 3), TensorSpec("q_proj.lora_A", (2, 3))
        >>> add_directions_([theta], [spec], [Direction(seed=7, step=0)], [0.5])
        >>> theta
        tensor([[-0.1176,  0.2077,  0.8532],
                [ 0.0791, -0.1057,  0.4630]])
    """
    function = "add_directions_"
    plan = _plan_of(function, tensors, specs, None)
    coefficients = rounded_factors(function, "directions", "coefficients", directions, coefficients)
    name = resolve(function, backend, plan.device.type)
    if name in ON_DEVICE:
        sent = scalars_of(plan.device, update=(directions, coefficients))
        _on_device(name).add_scalars_(plan, sent)
    else:
        _on_host(name).add_directions_(plan, directions, coefficients)


def perturb_into(
    masters: Sequence[torch.Tensor] | AdapterPlan,
    specs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[Sequence[torch.Tensor]] | None = None,
    directions: Sequence[Direction] = (),
    scales: Sequence[float] = (),
    *,
    update: tuple[Sequence[Direction], Sequence[float]] | None = None,
    backend: str | None = None,
) -> None:
    """Update fp32 masters, then write perturbed copies of them to slots, all in one call.

        master_i     <- fma(c_{J-1}, z_{J-1}, ... fma(c_0, z_0, master_i))          for `update`
        output[k][i] <- round(fma(scale_k, z(direction_k), master_i))               for every k, i

    Args:
        masters: N fp32 tensors `[rows_i, cols_i]`, one device, last dim contiguous; written only
            where there is an update. Or an `AdapterPlan` built with outputs.
        specs: N `TensorSpec`, the logical place of each tensor; None with a plan.
        outputs: K slots of N tensors each, fp32 | fp16 | bf16, last dim contiguous; strided views
            are fine and nothing outside them is written. None with a plan. Slots must not overlap
            one another nor the masters; only equal addresses are detected.
        directions: K `Direction`, one per slot; one named several times is generated once.
        scales: K finite floats, rounded to fp32 once, e.g. (+eps, -eps). A scale of 0 writes
            round(master), and no z is computed.
        update: (directions, coefficients) applied to the masters first, as `add_directions_` does.
        backend: "reference" | "cpu" | "triton" | "cuda" | None (the best one for the device).

    Returns:
        None; the outputs, and with an update the masters, are written, unseen by autograd.

    Raises:
        ValueError: what `AdapterPlan` raises, specs or outputs beside a plan, no outputs, lengths
            that do not match, a scale that is not finite in fp32, or an unknown backend name.
        RuntimeError: the requested backend is not usable here, with the reason.

    Numerics: z and the sum in fp32, one rounding (nearest even) to each output's dtype.
    Deterministic; the same bits on every backend, whatever the number of threads.
    Graph-safe: no, each call sends its scalars. Cost: the masters are read once (and written once
    with an update), each output is written once, one z is generated per distinct direction.
    Source: Malladi et al. 2023 (arXiv 2305.17333), Alg. 1; Salmon et al. 2011 for Philox.

    Example:
        >>> import torch
        >>> theta, spec = torch.ones(2, 3), TensorSpec("q_proj.lora_A", (2, 3))
        >>> plus, minus = torch.empty(2, 3), torch.empty(2, 3)
        >>> pair = [Direction(seed=7, step=0)] * 2
        >>> perturb_into([theta], [spec], [[plus], [minus]], pair, [0.125, -0.125])
        >>> plus - theta
        tensor([[-0.0294,  0.0519,  0.2133],
                [ 0.0198, -0.0264,  0.1158]])
    """
    function = "perturb_into"
    plan = _plan_of(function, masters, specs, outputs)
    if plan.outputs is None:
        raise ValueError(
            f"{function}: outputs must be one sequence of tensors per slot, got None; pass them, "
            "or an AdapterPlan built with outputs."
        )
    if len(directions) != len(plan.outputs):
        raise ValueError(
            f"{function}: directions must have one entry per slot, {len(plan.outputs)}, got "
            f"{len(directions)}; name a direction for each slot (with scale 0 for an exact copy)."
        )
    scales = rounded_factors(function, "directions", "scales", directions, scales)
    moves, factors = ((), ()) if update is None else update
    factors = rounded_factors(function, "update directions", "update coefficients", moves, factors)
    name = resolve(function, backend, plan.device.type)
    if name in ON_DEVICE:
        sent = scalars_of(plan.device, directions, scales, (moves, factors))
        _on_device(name).perturb_scalars(plan, sent)
    else:
        _on_host(name).perturb_into(plan, directions, scales, (moves, factors))


def _plan_of(
    function: str,
    tensors: Sequence[torch.Tensor] | AdapterPlan,
    specs: Sequence[TensorSpec] | None,
    outputs: Sequence[Sequence[torch.Tensor]] | None,
) -> AdapterPlan:
    if isinstance(tensors, AdapterPlan):
        if specs is not None or outputs is not None:
            raise ValueError(
                f"{function}: specs and outputs must be None beside an AdapterPlan, got "
                "another set of them; they are part of the plan."
            )
        return tensors
    if specs is None:
        raise ValueError(
            f"{function}: specs must be one TensorSpec per tensor, got None; pass them, or an "
            "AdapterPlan."
        )
    return AdapterPlan(tensors, specs, outputs)


def rounded_factors(
    function: str, left: str, right: str, directions: Sequence[Direction], factors: Sequence[float]
) -> list[float]:
    """The factors rounded to fp32, once and for every backend."""
    if len(directions) != len(factors):
        raise ValueError(
            f"{function}: {left} and {right} must have one length, got {len(directions)} and "
            f"{len(factors)}; pass one factor per direction."
        )
    values = torch.tensor([float(factor) for factor in factors], dtype=torch.float32)
    rounded: list[float] = values.tolist()
    for k, value in enumerate(rounded):
        if not math.isfinite(value):
            raise ValueError(
                f"{function}: {right}[{k}] must be finite in fp32, got {factors[k]!r}; skip the "
                "step of a non-finite loss instead of applying it."
            )
    return rounded


def _on_host(name: str) -> _HostBackend:
    return cast(_HostBackend, _module(name))


def _on_device(name: str) -> _DeviceBackend:
    return cast(_DeviceBackend, _module(name))


def _module(name: str) -> _Backend:
    return cast(_Backend, load("sample", name))
