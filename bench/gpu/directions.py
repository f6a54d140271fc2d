"""Directions on a GPU: the device backends against what a user would run without them.

`python -m bench.gpu.directions --out DIR` writes DIR/gpu_directions.{json,md} and prints the table;
--dry-run prints the cases with their models and needs no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import mezo_kernels as mk
from bench import runner
from bench.baselines import BASELINES
from bench.directions_cases import MEANING, Buffers, Case, cases, has_bits_of_cpu
from bench.gpu import roofline as gpu_roofline
from bench.timing import Timing, as_graph, gpu_environment, interleave_on_gpu, num_sets

BACKENDS = ("cuda", "triton")
Row = dict[str, object]


def plan_of(found: list[Case]) -> str:
    """The cases as a table of what they move and compute."""
    lines = ["| case | tensors | elements | bytes | lane instructions | passes of MeZO |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {c.name} | {len(c.specs)} | {c.num_elements} | {c.nbytes} | {c.sass:.4g} | "
        f"{c.num_passes} |"
        for c in found
    ]
    meanings = "\n".join(f"* {what}: {meaning}" for what, meaning in MEANING.items())
    return "\n".join(lines) + f"\n\n{meanings}"


def variants(
    make: Callable[[Buffers], Callable[[], object]], sets: list[Buffers], *, is_graph: bool
) -> list[Callable[[], object]]:
    """The same call on each set of buffers, as a graph or as it is."""
    made = [make(buffers) for buffers in sets]
    return [as_graph(call) for call in made] if is_graph else made


def measure_case(case: Case, l2_bytes: int, rounds: int) -> tuple[dict[str, Timing], list[str]]:
    """Timings by candidate, the baseline first, and what failed or could not run."""
    notes = []
    sets = [Buffers(case, "cuda", case.specs) for _ in range(num_sets(case.nbytes, l2_bytes))]
    calls: dict[str, list[Callable[[], object]]] = {}
    if case.what != "replay":
        for name, make in BASELINES.items():
            try:
                # The loop as MeZO runs it, launch by launch; and at its best, as a graph.
                if name == "torch.normal loop":
                    calls[name] = variants(make, sets, is_graph=False)
                    name += " as a graph"
                calls[name] = variants(make, sets, is_graph=name != "torch.compile")
            except NotImplementedError:
                continue
            except Exception as error:
                notes.append(f"{case.name}: {name} could not run: {type(error).__name__}: {error}")
    for backend in BACKENDS:
        if mk.backends()[backend] is not None:
            continue
        if not has_bits_of_cpu(case, backend):
            notes.append(f"FAIL {case.name}: {backend} does not give the bits of the cpu backend")
            continue
        make = make_ours(backend)
        calls[backend] = variants(make, sets, is_graph=True)
        if case.what != "replay":
            calls[f"{backend} without a graph"] = variants(make, sets, is_graph=False)
    return interleave_on_gpu(calls, rounds) if calls else {}, notes


def make_ours(backend: str) -> Callable[[Buffers], Callable[[], object]]:
    return lambda buffers: buffers.ours(backend)


def rows_of(
    case: Case, timings: dict[str, Timing], roofline: gpu_roofline.Roofline, l2_bytes: int
) -> list[Row]:
    """Rows of the table; the model holds for our backends alone."""
    rows = []
    peak = roofline.patterns[case.nbytes // case.num_elements]
    is_cold = case.nbytes * num_sets(case.nbytes, l2_bytes) > 2 * l2_bytes
    for timing in timings.values():
        p20, p80 = timing.p20_p80
        row: Row = {
            "case": case.name,
            "path": timing.name,
            "us": round(timing.p50 * 1e6, 2),
            "p20_us": round(p20 * 1e6, 2),
            "p80_us": round(p80 * 1e6, 2),
            "ratio": round(timing.ratio, 2),
            "l2": "cold" if is_cold else "hot",
        }
        if timing.name.startswith(BACKENDS):
            row |= {
                "gb_per_s": round(case.nbytes / timing.p50 * 1e-9, 1),
                "percent_of_copy": round(100 * case.nbytes / timing.p50 / peak, 1),
                "memory_us": round(case.nbytes / peak * 1e6, 2),
                "issue_us": round(case.sass / roofline.issue_per_second * 1e6, 2),
            }
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| case | path | us [p20, p80] | ratio | GB/s | % of copy | memory us | issue us | L2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        model = [str(r.get(key, "")) for key in ("gb_per_s", "percent_of_copy")]
        bounds = [str(r.get(key, "")) for key in ("memory_us", "issue_us")]
        lines.append(
            f"| {r['case']} | {r['path']} | {r['us']} [{r['p20_us']}, {r['p80_us']}] | "
            f"{r['ratio']} | {' | '.join(model + bounds)} | {r['l2']} |"
        )
    return "\n".join(lines)


def report(rows: list[Row], roofline: gpu_roofline.Roofline, where: Row, notes: list[str]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    limits = (
        f"copy {roofline.copy * 1e-9:.0f} GB/s; in the patterns of our kernels "
        + ", ".join(f"{n} B: {rate * 1e-9:.0f} GB/s" for n, rate in roofline.patterns.items())
        + f"; IMAD.WIDE.U32 {roofline.lanes_per_clock:.1f} lanes per clock and multiprocessor at "
        f"{roofline.clock_hz * 1e-9:.3f} GHz"
    )
    said = "\n".join(f"* {note}" for note in notes)
    return (
        "# Directions on a GPU\n\n"
        "Ratio: the baseline's time over the row's, median of per-round ratios, interleaved in one "
        "process. The baseline is the first row of a case: MeZO's loop as it is run, without its "
        "reseeding; a replay has none. Our rows are CUDA graphs of the call with scalars on the "
        "device, after a check of their bits against the cpu backend. `memory us` is the time of "
        "a copy in the same pattern, `issue us` the static instruction count at the full issue "
        "rate.\n\n"
        f"{table(rows)}\n\nLimits measured here: {limits}.\n\n{said}\n\nMeasured with: {facts}.\n"
    )


def run(out: Path, rounds: int, budget_s: float, only: str) -> int:
    """Measure and write; the exit status is 1 where a case failed."""
    where = gpu_environment()
    l2_bytes = int(str(where["l2_bytes"]))
    roofline = gpu_roofline.measure()
    rows: list[Row] = []

    def measure(case: Case) -> list[str]:
        timings, said = measure_case(case, l2_bytes, rounds)
        rows.extend(rows_of(case, timings, roofline, l2_bytes))
        return said

    notes = [f"{b}: {reason}" for b in BACKENDS if (reason := mk.backends()[b]) is not None]
    notes += runner.measure_all(cases(), measure, budget_s=budget_s, only=only)
    facts = {**where, "roofline": vars(roofline), "notes": notes, "rows": rows}
    return runner.write(out, "gpu_directions", report(rows, roofline, where, notes), facts)


if __name__ == "__main__":
    sys.exit(runner.main("gpu_directions", __doc__, cases, plan_of, run, rounds=30))
