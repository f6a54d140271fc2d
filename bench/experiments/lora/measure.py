"""Perturbed LoRA on a GPU: z inside of the products against slots, and which backend wins where.

`python -m bench.experiments.lora.measure --out DIR` writes DIR/perturbed_lora.{json,md} and prints
the table; --dry-run prints the cases and needs no GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import mezo_kernels as mk
from bench import gpu_main
from bench.experiments.lora.call import LoraCall
from bench.shapes import MODELS
from bench.timing import Timing, as_graph, gpu_environment, interleave_on_gpu
from mezo_kernels import directions
from mezo_kernels.directions.scalars import scalars_of

EPS, SCALING = 1e-3, 2.0
BACKENDS = ("triton", "cuda")
SLOTS, PRODUCTS = "slots and products", "products only"
NEXT = mk.Direction(0, 1)
# Modules of one shape have one entry.
MODULES = {
    "llama-3.1-8b": ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"),
    "opt-13b": ("self_attn.q_proj", "fc1", "fc2"),
}
ROWS = (16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Case:
    """One module in every layer of a model, a pair of copies with equally many rows."""

    model: str
    module: str
    rank: int
    rows: int  # of each sign

    @property
    def name(self) -> str:
        return f"{self.model} {self.module.split('.')[-1]} r{self.rank} T={self.rows}"

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """(D_in, D_out)."""
        return MODELS[self.model].linears()[self.module]

    @property
    def num_layers(self) -> int:
        return MODELS[self.model].layers

    @property
    def num_elements(self) -> int:
        """Elements of A and B of one layer: normals to draw, and what a slot holds."""
        return self.rank * sum(self.sizes)


def cases() -> list[Case]:
    return [
        Case(model, module, rank, rows)
        for model, modules in MODULES.items()
        for module in modules
        for rank in (8, 16)
        for rows in ROWS
    ]


def plan_of(found: list[Case]) -> str:
    lines = ["| case | layers | D_in | D_out | rows | elements of A and B | slot bytes moved |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {c.name} | {c.num_layers} | {c.sizes[0]} | {c.sizes[1]} | {2 * c.rows} | "
        f"{c.num_elements} | {2 * 2 * 2 * c.num_elements} |"
        for c in found
    ]
    return "\n".join(lines)


class Buffers:
    """Masters and slots of all layers, with one batch of inputs and outputs."""

    def __init__(self, case: Case, device: str, num_layers: int | None = None) -> None:
        self.case = case
        d_in, d_out = case.sizes
        generator = torch.Generator(device).manual_seed(1)

        def normal(rows: int, cols: int) -> torch.Tensor:
            scale = cols**-0.5
            return torch.randn(rows, cols, generator=generator, device=device) * scale

        self.layers = range(case.num_layers if num_layers is None else num_layers)
        names = [f"model.layers.{layer}.{case.module}" for layer in self.layers]
        shapes = {"A": (case.rank, d_in), "B": (d_out, case.rank)}
        self.specs = [mk.TensorSpec(f"{n}.lora_{f}", s) for n in names for f, s in shapes.items()]
        self.masters = [normal(*spec.shape) for spec in self.specs]
        self.slots = [
            [torch.empty_like(master, dtype=torch.bfloat16) for master in self.masters]
            for _ in range(2)
        ]
        self.plan = mk.AdapterPlan(self.masters, self.specs, self.slots)
        self.scalars = scalars_of(self.plan.device, [NEXT] * 2, [EPS, -EPS])
        self.x = normal(2 * case.rows, d_in).to(torch.bfloat16)
        self.y = normal(2 * case.rows, d_out).to(torch.bfloat16)
        self.sent = [self.call(layer).on_device() for layer in self.layers]

    def call(self, layer: int) -> LoraCall:
        a, b = self.masters[2 * layer : 2 * layer + 2]
        a_spec, b_spec = self.specs[2 * layer : 2 * layer + 2]
        ends = (0, self.case.rows, 2 * self.case.rows)
        pair, scales = (NEXT, NEXT), (EPS, -EPS)
        return LoraCall(
            self.x, a, b, a_spec, b_spec, pair, scales, ends, SCALING, self.y, is_added=True
        )

    def inside(self, backend: str) -> None:
        """All layers with z inside of the products."""
        module = importlib.import_module(f"bench.experiments.lora.{backend}")
        for sent in self.sent:
            module.run(sent)

    def write_slots(self, backend: str) -> None:
        """The slots of all layers, in one launch."""
        directions.perturb_scalars(self.plan, self.scalars, backend)

    def products(self) -> None:
        """All layers from their slots."""
        for layer in self.layers:
            for slot, x, y in zip(self.slots, self.x.chunk(2), self.y.chunk(2), strict=True):
                a, b = slot[2 * layer : 2 * layer + 2]
                torch.addmm(y, x @ a.T, b.T, alpha=SCALING, out=y)


def difference(case: Case, name: str, device: str, writer: str, num_layers: int = 1) -> float:
    """RMS of what a backend and the slots add to y, one from the other, over that of the slots."""
    results = []
    for run in ("inside", "slots"):
        buffers = Buffers(case, device, num_layers)
        before = buffers.y.clone()
        if run == "inside":
            buffers.inside(name)
        else:
            buffers.write_slots(writer)
            buffers.products()
        results.append(buffers.y.double() - before.double())
    inside, slots = results
    return float((inside - slots).square().mean().sqrt() / slots.square().mean().sqrt())


def measure(case: Case, backends: list[str], rounds: int) -> tuple[dict[str, Timing], list[str]]:
    """Timings of all layers by candidate, and what failed."""
    notes, buffers = [], Buffers(case, "cuda")
    writer = "cuda" if "cuda" in backends else backends[0]

    def slots() -> None:
        buffers.write_slots(writer)
        buffers.products()

    calls: dict[str, Callable[[], object]] = {SLOTS: slots, PRODUCTS: buffers.products}
    for name in backends:
        # y and h are rounded to bf16 on the way, and the library adds in another order.
        if (found := difference(case, name, "cuda", writer)) > 2**-6:
            notes.append(f"FAIL {case.name}: {name} differs from the slots by {found:.2g} (RMS)")
            continue
        calls[name] = lambda name=name: buffers.inside(name)
    graphs = {name: [as_graph(call)] for name, call in calls.items()}
    return interleave_on_gpu(graphs, rounds), notes


def row_of(case: Case, timings: dict[str, Timing]) -> dict[str, object]:
    """Microseconds a layer, and the ratios to the slots."""
    layers = case.num_layers
    row: dict[str, object] = {"case": case.name}
    for name, timing in timings.items():
        p20, p80 = timing.p20_p80
        row[name] = {
            "us": round(timing.p50 * 1e6 / layers, 2),
            "p20_us": round(p20 * 1e6 / layers, 2),
            "p80_us": round(p80 * 1e6 / layers, 2),
            "ratio": round(timing.ratio, 3),
        }
    contenders = {name: t.ratio for name, t in timings.items() if name != PRODUCTS}
    row["wins"] = max(contenders, key=lambda name: contenders[name])
    return row


def table(rows: list[dict[str, object]]) -> str:
    names = (SLOTS, PRODUCTS, *BACKENDS)
    lines = ["| case | " + " | ".join(names) + " | wins |", "|---|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = []
        for name in names:
            cell = row.get(name)
            assert cell is None or isinstance(cell, dict)
            cells.append("" if cell is None else f"{cell['us']} (x{cell['ratio']})")
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {row['wins']} |")
    return "\n".join(lines)


def report(rows: list[dict[str, object]], where: dict[str, object], notes: list[str]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    said = "\n".join(f"* {note}" for note in notes)
    return (
        "# Perturbed LoRA on a GPU\n\n"
        f"Microseconds a layer, bf16, +eps and -eps with T rows each, added to y. `{SLOTS}`: "
        "perturb_into of the module's slots in all layers in one launch, then two library products "
        f"a copy and layer; `{PRODUCTS}`: without the launch, a bound for slots that many batches "
        "share. The backends make z inside of the products. Each candidate is a CUDA graph of all "
        f"layers, interleaved; the ratio is over `{SLOTS}`, median of the rounds.\n\n"
        f"{table(rows)}\n\n{said}\n\nMeasured with: {facts}.\n"
    )


def run(out: Path, rounds: int, budget_s: float, only: str) -> int:
    """Measure and write; the exit status is 1 where a case failed."""
    where = gpu_environment()
    reasons = {name: mk.backends()[name] for name in BACKENDS}
    backends = [name for name in BACKENDS if reasons[name] is None]
    rows: list[dict[str, object]] = []

    def measure_one(case: Case) -> list[str]:
        timings, said = measure(case, backends, rounds)
        rows.append(row_of(case, timings))
        return said

    notes = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    found = cases() if backends else []
    notes += gpu_main.measure_all(found, measure_one, budget_s=budget_s, only=only)
    facts = {**where, "notes": notes, "rows": rows}
    return gpu_main.write(out, "perturbed_lora", report(rows, where, notes), facts)


if __name__ == "__main__":
    sys.exit(gpu_main.main("perturbed_lora", __doc__, cases, plan_of, run, rounds=20))
