"""What a user would run without our kernels, for each case of bench/directions_cases.py.

None of them computes our bits; each does the same work on the same tensors. All draw a fresh z per
pass, since that is what MeZO pays for not storing it; none reseeds, which a CUDA graph forbids and
which would only slow them down.
"""

from collections.abc import Callable

import torch

from bench.directions_cases import EPS, LR, Buffers

SCALES = {
    "pair": (EPS, -2 * EPS),
    "step": (EPS, -2 * EPS, EPS, LR),
    "update": (LR,),
}


def torch_loop(buffers: Buffers) -> Callable[[], object]:
    """MeZO's `zo_perturb_parameters`: for each tensor draw z, add it in place, pass by pass."""

    def run() -> None:
        for scale in SCALES[buffers.case.what]:
            for tensor in buffers.masters:
                z = torch.normal(0.0, 1.0, tensor.shape, device=tensor.device, dtype=tensor.dtype)
                tensor.add_(z, alpha=scale)

    return run


def torch_foreach(buffers: Buffers) -> Callable[[], object]:
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


def torch_compiled(buffers: Buffers) -> Callable[[], object]:
    """The formula of our call, compiled: z drawn and used in one kernel. One tensor only."""
    if len(buffers.masters) != 1:
        raise NotImplementedError("compiled for the flat case alone")

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


def triton_randn(buffers: Buffers) -> Callable[[], object]:
    """A kernel around `tl.randn`, in place: stock Triton. One tensor and an update only."""
    if len(buffers.masters) != 1 or buffers.case.what != "update":
        raise NotImplementedError("written for the flat update alone")
    from bench.gpu.triton_randn import add_randn

    return lambda: add_randn(buffers.masters[0], LR)


BASELINES = {
    "torch.normal loop": torch_loop,
    "torch._foreach": torch_foreach,
    "torch.compile": torch_compiled,
    "tl.randn": triton_randn,
}
