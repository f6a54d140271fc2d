"""What a user would run without our kernels.

None of the loops computes our bits; each does the same work on the same tensors and draws a fresh z
per pass, since that is what MeZO pays for not storing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.directions_cases import EPS, LR, Buffers, Case
from bench.timing import Call

SCALES = {
    "pair": (EPS, -2 * EPS),
    "step": (EPS, -2 * EPS, EPS, LR),
    "update": (LR,),
}
LOOP = "torch.normal loop"


def perturb(tensors: Sequence[torch.Tensor], scale: float, seed: int | None = None) -> None:
    """MeZO's `zo_perturb_parameters`: reseed, then for each tensor draw z and add it in place.

    ``seed`` is None in a CUDA graph, which forbids reseeding; that would only slow it down.
    """
    if seed is not None:
        torch.manual_seed(seed)
    for tensor in tensors:
        z = torch.normal(0.0, 1.0, tensor.shape, device=tensor.device, dtype=tensor.dtype)
        tensor.add_(z, alpha=scale)


def torch_loop(what: str, tensors: Sequence[torch.Tensor], seed: int | None = None) -> Call:
    """The passes of MeZO's loop for a case: a step has both signs, restore and update."""

    def run() -> None:
        for scale in SCALES[what]:
            perturb(tensors, scale, seed)

    return run


def torch_foreach(buffers: Buffers) -> Call:
    """One draw for all tensors and one multi-tensor add, pass by pass."""
    sizes = [master.numel() for master in buffers.masters]

    def run() -> None:
        for scale in SCALES[buffers.case.what]:
            flat = torch.randn(sum(sizes), device=buffers.masters[0].device)
            parts = [
                part.view(master.shape)
                for part, master in zip(flat.split(sizes), buffers.masters, strict=True)
            ]
            torch._foreach_add_(buffers.masters, parts, alpha=scale)

    return run


def torch_compiled(buffers: Buffers) -> Call:
    """The formula of our call on one tensor, compiled: z drawn and used in one kernel."""

    def formula(master: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = []
        if buffers.case.what != "pair":
            master = torch.add(master, torch.randn_like(master), alpha=LR)
            outputs.append(master)
        if buffers.slots:
            z = torch.randn_like(master)
            outputs += [(master + s * z).to(torch.bfloat16) for s in (EPS, -EPS)]
        return tuple(outputs)

    compiled = torch.compile(formula)
    return lambda: compiled(buffers.masters[0])


def triton_randn(buffers: Buffers) -> Call:
    """A kernel around `tl.randn` on one tensor, in place: stock Triton."""
    from bench.gpu.triton_randn import add_randn

    return lambda: add_randn(buffers.masters[0], LR)


def gpu_baselines(case: Case) -> dict[str, Callable[[Buffers], Call]]:
    """The baselines that do the work of a case; a replay has none."""
    if case.what == "replay":
        return {}
    found = {
        LOOP: lambda buffers: torch_loop(case.what, buffers.masters),
        "torch._foreach": torch_foreach,
    }
    if len(case.specs) == 1:
        found["torch.compile"] = torch_compiled
        if case.what == "update":
            found["tl.randn"] = triton_randn
    return found
