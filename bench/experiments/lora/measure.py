"""Perturbed LoRA on a GPU: z inside of the products against slots, and which backend wins where.

`python -m bench.experiments.lora.measure --out DIR` writes DIR/perturbed_lora.{json,md} and prints
the table; --dry-run prints the cases and needs no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

import mezo_kernels as mk
from bench import runner
from bench.environment import facts_line
from bench.experiments.lora.call import LoraCall
from bench.runner import Bench, Candidate, Facts, Question, Row
from bench.shapes import MODELS
from bench.timing import Call, CudaEvents, as_graph, interleave
from mezo_kernels.backends import load
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
    columns: dict[str, Callable[[Row], object]] = {
        "case": lambda r: r["case"].name,
        "layers": lambda r: r["case"].num_layers,
        "D_in": lambda r: r["case"].sizes[0],
        "D_out": lambda r: r["case"].sizes[1],
        "rows": lambda r: 2 * r["case"].rows,
        "elements of A and B": lambda r: r["case"].num_elements,
        "slot bytes moved": lambda r: 2 * 2 * 2 * r["case"].num_elements,
    }
    return runner.table([{"case": case} for case in found], columns)


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
        module = load("perturbed_lora", backend)
        for sent in self.sent:
            module.run(sent)

    def write_slots(self, backend: str) -> None:
        """The slots of all layers, in one launch."""
        load("perturb_into", backend).perturb_scalars(self.plan, self.scalars)

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


def candidates(case: Case, buffers: Buffers, usable: list[str]) -> list[Candidate]:
    """The slots, the products only, and each backend that is usable here."""
    writer = "cuda" if "cuda" in usable else usable[0]

    def slots() -> None:
        buffers.write_slots(writer)
        buffers.products()

    def graph(call: Call) -> Callable[[], Call]:
        return lambda: as_graph(call)

    def complaint(name: str) -> str | None:
        # y and h are rounded to bf16 on the way, and the library adds in another order.
        found = difference(case, name, "cuda", writer)
        return f"differs from the slots by {found:.2g} (RMS)" if found > 2**-6 else None

    return [
        Candidate(SLOTS, graph(slots), is_ours=True),
        Candidate(PRODUCTS, graph(buffers.products), is_ours=True),
        *(
            Candidate(
                name,
                graph(lambda name=name: buffers.inside(name)),
                lambda _, name=name: complaint(name),
                is_ours=True,
            )
            for name in usable
        ),
    ]


def measure(case: Case, bench: Bench) -> None:
    """Microseconds per layer of each candidate, and the ratios to the slots."""
    usable = [name for name in BACKENDS if mk.backends()[name] is None]
    if not usable:
        raise runner.StopRunError("no backend is usable here")
    calls = bench.usable({"case": case.name}, candidates(case, Buffers(case, "cuda"), usable))
    for timing in interleave(calls, bench.rounds, stopwatch=CudaEvents()).values():
        row = runner.microseconds(timing, 2)
        per_layer = {k: round(row[k] / case.num_layers, 2) for k in ("p50_us", "p20_us", "p80_us")}
        bench.rows.append({"case": case.name, "path": timing.name, **row, **per_layer})


def begin(bench: Bench) -> None:
    reasons = {name: mk.backends()[name] for name in BACKENDS}
    bench.notes += [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]


def table(rows: list[Row]) -> str:
    """A line per case: us and ratio of each candidate, and which of them is the fastest."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["path"]] = row

    def cell(found: dict[str, Row], name: str) -> str:
        row = found.get(name)
        if row is None or "fail" in row:
            return "" if row is None else "FAIL"
        return f"{row['p50_us']} (x{row['ratio']})"

    def fastest(found: dict[str, Row]) -> str:
        times = {n: r["p50_us"] for n, r in found.items() if n != PRODUCTS and "fail" not in r}
        return min(times, key=lambda name: times[name], default="")

    columns: dict[str, Callable[[Row], object]] = {"case": lambda r: r["case"]}
    for name in (SLOTS, PRODUCTS, *BACKENDS):
        columns[name] = lambda r, name=name: cell(by_case[r["case"]], name)
    columns["wins"] = lambda r: fastest(by_case[r["case"]])
    return runner.table([{"case": case} for case in by_case], columns)


def report(facts: Facts) -> str:
    return (
        "# Perturbed LoRA on a GPU\n\n"
        f"Microseconds per layer, bf16, +eps and -eps with T rows each, added to y. `{SLOTS}`: "
        "perturb_into of the module's slots in all layers in one launch, then two library products "
        f"per copy and layer; `{PRODUCTS}`: without the launch, a bound for slots that many "
        "batches share. The backends make z inside of the products. Each candidate is a CUDA "
        f"graph of all layers, interleaved; the ratio is over `{SLOTS}`, median of the rounds.\n\n"
        f"{table(facts['rows'])}\n\n{runner.notes_list(facts['notes'])}{facts_line(facts)}\n"
    )


QUESTION = Question(
    name="perturbed_lora",
    description=__doc__,
    cases=lambda options: cases(),
    measure=measure,
    report=report,
    plan=plan_of,
    begin=begin,
    rounds=20,
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
