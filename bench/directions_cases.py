"""What bench/directions.py times: the cases, their byte and instruction models, their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

import mezo_kernels as mk
from bench.shapes import FLAT, lora_specs
from mezo_kernels.backends import load
from mezo_kernels.directions.scalars import scalars_of

EPS, LR = 1e-3, -1e-6
# Static SASS per element of the cuda backend on sm_90 (tests/kernels/directions/
# test_cuda_budgets.py): what a thread executes once, and what each further direction adds.
SASS = {"pair": 50.5, "step": 91.6, "update": 45.9, "replay": 45.9}
SASS_PER_DIRECTION = 38.5
NBYTES = {"pair": 8, "step": 12, "update": 8, "replay": 8}
MEANING = {
    "pair": "fp32 masters -> two slots, +eps z and -eps z",
    "step": "update of the fp32 masters, then the next two slots",
    "update": "update of the fp32 masters, in place",
    "replay": "many directions into the fp32 masters, in place",
}


@dataclass(frozen=True)
class Case:
    """One call on the LoRA tensors of one model; slots have ``dtype``, masters are fp32."""

    what: str
    model: str
    rank: int = 8
    targets: str = "all-linear"
    num_directions: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        where = self.model if self.model == FLAT else f"{self.model} {self.targets} r{self.rank}"
        width = "" if self.dtype == torch.bfloat16 else f" {str(self.dtype).split('.')[1]}"
        many = f" K={self.num_directions}" if self.num_directions > 1 else ""
        return f"{self.what} {where}{width}{many}"

    @cached_property
    def specs(self) -> list[mk.TensorSpec]:
        return lora_specs(self.model, self.rank, self.targets)

    @property
    def num_elements(self) -> int:
        return sum(spec.shape[0] * spec.shape[1] for spec in self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes that must move with bf16 slots: masters in, masters out if changed, slots out."""
        return NBYTES[self.what] * self.num_elements

    @property
    def sass(self) -> float:
        """Lane instructions, by the static count of the cuda backend."""
        per_element = SASS[self.what] + (self.num_directions - 1) * SASS_PER_DIRECTION
        return per_element * self.num_elements

    @property
    def num_passes(self) -> int:
        """Passes of MeZO's loop (draw z, add) that do the same: a step has four."""
        return {"pair": 2, "step": 4, "update": 1, "replay": self.num_directions}[self.what]


def cpu_cases(model: str) -> list[Case]:
    """Each call with slots in bf16, then each in fp32."""
    return [
        Case(what, model, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for what in ("pair", "step", "update")
    ]


def gpu_cases(*, replay_directions: int = 10_000) -> list[Case]:
    """All cases: the model of the headline first, then the largest, and the long replay last."""
    models = [("opt-13b", 8), (FLAT, 8), ("qwen3-32b", 16), ("llama-3.1-8b", 16)]
    models += [("opt-1.3b", 8), ("smollm2-135m", 8)]
    found = [
        Case(what, model, rank, targets)
        for model, rank in models
        for targets in (("all-linear",) if model == FLAT else ("all-linear", "qv"))
        for what in ("pair", "step", "update")
    ]
    return [*found, Case("replay", "opt-13b", 8, "qv", replay_directions)]


class Buffers:
    """One set of masters and slots of a case on a device."""

    def __init__(self, case: Case, device: str, specs: Sequence[mk.TensorSpec]) -> None:
        self.case, self.specs, self.device = case, list(specs), torch.device(device)
        generator = torch.Generator(device).manual_seed(1)
        self.masters = [
            torch.randn(spec.shape, generator=generator, device=device) for spec in self.specs
        ]
        num_slots = 2 if case.what in ("pair", "step") else 0
        self.slots = [
            [torch.empty_like(master, dtype=case.dtype) for master in self.masters]
            for _ in range(num_slots)
        ]
        self.plan = mk.AdapterPlan(self.masters, self.specs, self.slots or None)

    def _directions(self) -> tuple[list[mk.Direction], list[float], tuple[list, list]]:
        """(directions of the slots, scales, update)."""
        case = self.case
        before = [mk.Direction(0, k) for k in range(case.num_directions)]
        update = ([], []) if case.what == "pair" else (before, [LR] * len(before))
        pair = [mk.Direction(0, case.num_directions)] * len(self.slots)
        return pair, [EPS, -EPS][: len(self.slots)], update

    def on_device(self, backend: str, **how: str) -> Callable[[], object]:
        """The call on a device backend, with scalars that lie there already.

        Args:
            backend: its name.
            how: further arguments of the backend's own functions.
        """
        module = load("perturb_into", backend)
        run = module.perturb_scalars if self.slots else module.add_scalars_
        scalars = scalars_of(self.device, *self._directions())
        return lambda: run(self.plan, scalars, **how)

    def on_host(self, backend: str) -> Callable[[], object]:
        """The public call, on the cpu or the reference backend."""
        pair, scales, (moves, coefficients) = self._directions()
        if not self.slots:
            return lambda: mk.add_directions_(
                self.plan, directions=moves, coefficients=coefficients, backend=backend
            )
        update = (moves, coefficients) if moves else None
        return lambda: mk.perturb_into(
            self.plan, directions=pair, scales=scales, update=update, backend=backend
        )

    def everything(self) -> list[torch.Tensor]:
        return [*self.masters, *(tensor for slot in self.slots for tensor in slot)]

    def copy_masters_of(self, other: Buffers) -> None:
        for mine, theirs in zip(self.masters, other.masters, strict=True):
            mine.copy_(theirs)

    def has_bits_of(self, other: Buffers) -> bool:
        return all(
            torch.equal(a.cpu().view(torch.int8), b.cpu().view(torch.int8))
            for a, b in zip(self.everything(), other.everything(), strict=True)
        )


def complaint_of_cpu(case: Case) -> str | None:
    """Compare the cpu backend's code path in use with the reference, in the first layer."""
    ours, theirs = (Buffers(case, "cpu", case.specs[:14]) for _ in range(2))
    ours.on_host("cpu")()
    theirs.on_host("reference")()
    return None if ours.has_bits_of(theirs) else "differs from the bits of the reference"


def complaint_of_gpu(
    case: Case, backend: str, how: Mapping[str, str] | None = None, limit: int = 2_000_000
) -> str | None:
    """Compare a device backend with cpu: first and last tensors, up to ``limit`` elements.

    The flat case is cut to its first rows, and a replay to 4 tensors.
    """
    specs: list[mk.TensorSpec] = []
    for spec in case.specs if len(case.specs) > 1 else []:
        if sum(s.shape[0] * s.shape[1] for s in specs) < limit:
            specs.append(spec)
    if not specs:
        (whole,) = case.specs
        rows = limit // whole.shape[1]
        specs = [mk.TensorSpec(whole.name, (rows, whole.shape[1]), 0, 0, whole.shape)]
    specs = specs[:3] + specs[-1:] if case.what == "replay" else specs
    ours, theirs = Buffers(case, "cuda", specs), Buffers(case, "cpu", specs)
    theirs.copy_masters_of(ours)
    ours.on_device(backend, **(how or {}))()
    theirs.on_host("cpu")()
    return None if ours.has_bits_of(theirs) else "differs from the bits of the cpu backend"
