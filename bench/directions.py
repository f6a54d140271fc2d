"""Directions on the CPU, one thread: our calls against the torch.randn loop of MeZO.

`python -m bench.directions` prints the table and writes bench/results/cpu/directions.{json,md}.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mezo_kernels as mk
from bench.shapes import lora_specs
from bench.timing import Timing, environment, interleave
from mezo_kernels import _native

EPS = 1e-3
RESULTS = Path(__file__).parent / "results" / "cpu"


class Case:
    """The LoRA tensors of one model, two slots beside them, and the calls to compare."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        self.specs = lora_specs(model)
        self.masters = [torch.randn(spec.shape) for spec in self.specs]
        self.in_place = [master.to(dtype, copy=True) for master in self.masters]
        self.outputs = [[m.to(dtype, copy=True) for m in self.masters] for _ in range(2)]
        self.plan = mk.AdapterPlan(self.masters, self.specs, self.outputs)
        self.num_elements = sum(master.numel() for master in self.masters)
        self.step = 0

    def pair(self) -> list[mk.Direction]:
        self.step += 1
        return [mk.Direction(0, self.step)] * 2

    def torch_loop(self, scale: float) -> None:
        """One pass of MeZO's `zo_perturb_parameters`: reseed, draw z, add."""
        torch.manual_seed(0)
        for tensor in self.in_place:
            z = torch.normal(0.0, 1.0, tensor.shape, dtype=tensor.dtype)
            tensor.add_(z, alpha=scale)

    def torch_pair(self) -> None:
        """+eps, then -2 eps: both signs of one z, in place."""
        self.torch_loop(EPS)
        self.torch_loop(-2 * EPS)

    def torch_step(self) -> None:
        """All four passes of a MeZO step: both signs, restore, update."""
        self.torch_pair()
        self.torch_loop(EPS)
        self.torch_loop(-1e-6)

    def pair_into_slots(self) -> None:
        mk.perturb_into(self.plan, directions=self.pair(), scales=[EPS, -EPS], backend="cpu")

    def update_and_pair(self) -> None:
        update = (self.pair()[:1], [-1e-6])
        pair, scales = self.pair(), [EPS, -EPS]
        mk.perturb_into(self.plan, directions=pair, scales=scales, update=update, backend="cpu")

    def add_directions(self) -> None:
        directions = self.pair()[:1]
        mk.add_directions_(self.plan, directions=directions, coefficients=[-1e-6], backend="cpu")


def generation() -> Callable[[], object]:
    """64 directions of one L2-resident tensor, accumulated: generation and one fma each."""
    plan = mk.AdapterPlan([torch.zeros(256, 1024)], [mk.TensorSpec("hot", (256, 1024))])
    directions = [mk.Direction(0, step) for step in range(64)]
    coefficients = [1e-6] * len(directions)
    return lambda: mk.add_directions_(
        plan, directions=directions, coefficients=coefficients, backend="cpu"
    )


GENERATION_ELEMENTS = 64 * 256 * 1024


def on_isa(isa: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call on one code path."""

    def run() -> None:
        _native.module().set_isa(isa)
        call()
        _native.module().set_isa("auto")

    return run


def vector_isas() -> list[str]:
    """The vector code paths of this CPU and build, slowest first."""
    found = []
    for isa in _native.module().build_info()["isa_paths"]:
        try:
            _native.module().set_isa(isa)
        except RuntimeError:
            continue
        found.append(isa)
    _native.module().set_isa("auto")
    return [isa for isa in found if isa != "portable"]


def check(case: Case, isas: list[str]) -> None:
    """Refuse to time a path whose bits are not those of the reference (first layer's tensors)."""
    some = slice(0, 14)
    slots = [slot[some] for slot in case.outputs]
    plan = mk.AdapterPlan(case.masters[some], case.specs[some], slots)
    pair, scales = case.pair(), [EPS, -EPS]
    mk.perturb_into(plan, directions=pair, scales=scales, backend="reference")
    expected = [tensor.clone() for slot in slots for tensor in slot]
    for isa in isas:
        on_isa(isa, lambda: mk.perturb_into(plan, directions=pair, scales=scales, backend="cpu"))()
        written = [tensor for slot in slots for tensor in slot]
        if not all(map(torch.equal, written, expected)):
            raise SystemExit(f"FAIL: {isa} does not give the bits of the reference")


def measure(model: str, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Rows of the table: the torch loop against each code path, for the pair and for the step."""
    case = Case(model, dtype)
    rows = []
    isas = vector_isas()
    check(case, isas)
    for what, baseline, ours in (
        ("pair: +eps and -eps of one z", case.torch_pair, case.pair_into_slots),
        ("step: update, then the next pair", case.torch_step, case.update_and_pair),
        ("one pass: theta += c z", lambda: case.torch_loop(EPS), case.add_directions),
    ):
        calls = {"torch loop": baseline} | {isa: on_isa(isa, ours) for isa in isas}
        for timing in interleave(calls, rounds).values():
            rows.append(row(what, model, str(dtype), timing, case.num_elements))
    return rows


def row(what: str, model: str, dtype: str, timing: Timing, num_elements: int) -> dict[str, object]:
    p20, p80 = timing.p20_p80
    nanoseconds = 1e9 / num_elements
    return {
        "what": what,
        "model": model,
        "dtype": dtype.removeprefix("torch."),
        "path": timing.name,
        "ratio": round(timing.ratio, 2),
        "ns_per_element": round(timing.p50 * nanoseconds, 3),
        "p20": round(p20 * nanoseconds, 3),
        "p80": round(p80 * nanoseconds, 3),
        "elements": num_elements,
    }


def measure_generation(rounds: int) -> list[dict[str, object]]:
    """Rows for generation alone, all in the L2 cache, against torch.randn of the same size."""
    buffer = torch.empty(256, 1024)

    def torch_randn() -> None:
        for _ in range(64):
            buffer.normal_()

    calls = {"torch.normal_": torch_randn} | {
        isa: on_isa(isa, generation()) for isa in vector_isas()
    }
    what = "generation: one normal (ours with its fma)"
    return [
        row(what, "-", "torch.float32", timing, GENERATION_ELEMENTS)
        for timing in interleave(calls, rounds).values()
    ]


def measure_threads(rounds: int) -> list[dict[str, object]]:
    """Rows for the replay of 64 directions on 1, 2, 4 ... threads, in wall-clock seconds."""
    cores = len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores]
    call = generation()

    def on_threads(count: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)
            call()
            torch.set_num_threads(1)

        return run

    calls = {f"{count} threads": on_threads(count) for count in counts}
    timings = interleave(calls, rounds, clock=time.perf_counter)
    what = "threads: the same, wall-clock"
    return [row(what, "-", "torch.float32", t, GENERATION_ELEMENTS) for t in timings.values()]


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| what | dtype | path | ratio | ns per element | p20 - p80 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['what']} | {r['dtype']} | {r['path']} | {r['ratio']:.2f} | "
        f"{r['ns_per_element']:.2f} | {r['p20']:.2f} - {r['p80']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def report(rows: list[dict[str, object]], where: dict[str, object]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if key != "cpu_flags")
    return (
        "# Directions on the CPU\n\n"
        "Ratios first: the torch loop's time over ours, median of per-round ratios, interleaved in "
        "one process on one thread, in CPU time of that thread. The loop is MeZO's: reseed, "
        "`torch.normal` per tensor, add in place, all in the dtype of the row; two passes for a "
        "pair, four for a step (both signs, restore, update). Ours keeps fp32 masters: the pair "
        "goes from one z to two slots in the dtype of the row, the step applies the last update in "
        "the same call, and one pass adds to the masters. Written by `python -m bench.directions`."
        "\n\n"
        f"{table(rows)}\n\n"
        f"Measured with: {facts}; flags {' '.join(map(str, where['cpu_flags']))}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = environment()
    rows = measure_generation(arguments.rounds) + measure_threads(arguments.rounds)
    for dtype in (torch.bfloat16, torch.float32):
        rows += measure(arguments.model, dtype, arguments.rounds)
    text = report(rows, where)
    print(text)
    if arguments.dry_run:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "directions.md").write_text(text)
    (RESULTS / "directions.json").write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
