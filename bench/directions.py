"""Directions: our calls against the torch.normal loop of MeZO and what else a user would run.

`python -m bench.directions` measures this host and writes bench/results/<device>/directions.*. On
a CPU that is one thread, each of our code paths; on a GPU the device backends as CUDA graphs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

import mezo_kernels as mk
from bench import runner
from bench.baselines import LOOP, gpu_baselines, torch_loop
from bench.directions_cases import (
    MEANING,
    Buffers,
    Case,
    complaint_of_cpu,
    complaint_of_gpu,
    cpu_cases,
    gpu_cases,
)
from bench.environment import facts_line
from bench.gpu.roofline import measure as measure_roofline
from bench.runner import Bench, Candidate, Facts, Question, Row
from bench.timing import (
    Call,
    CudaEvents,
    HostClock,
    Timing,
    as_graph,
    interleave,
    num_sets,
)
from mezo_kernels import _native

# Our rows: the backend, and further arguments of its calls. One form of cuda goes once a GPU has
# spoken, here and where mezo_kernels/directions/cuda.py says it.
OURS: dict[str, tuple[str, dict[str, str]]] = {
    "cuda": ("cuda", {"lanes": "wide"}),
    "cuda contiguous": ("cuda", {"lanes": "contiguous"}),
    "triton": ("triton", {}),
}
# Of our rows, those that are timed without a graph, too.
LAUNCHED = ("cuda", "triton")
WHAT_ON_CPU = {
    "pair": "pair: +eps and -eps of one z",
    "step": "step: update, then the next pair",
    "update": "one pass: theta += c z",
    "generation": "generation: one normal (ours with its fma)",
    "threads": "threads: the same, wall-clock",
}
CPU_METHOD = (
    "Ratios first: the torch loop's time over ours, median of per-round ratios, interleaved in "
    "one process on one thread, in CPU time of that thread. The loop is MeZO's: reseed, "
    "`torch.normal` per tensor, add in place, all in the dtype of the row; two passes for a "
    "pair, four for a step (both signs, restore, update). Ours keeps fp32 masters: the pair "
    "goes from one z to two slots in the dtype of the row, the step applies the last update in "
    "the same call, and one pass adds to the masters. Written by `python -m bench.directions`."
)
GPU_METHOD = (
    "Ratio: the baseline's time over the row's, median of per-round ratios, interleaved in one "
    "process. The baseline is the first row of a case: MeZO's loop as it is run, without its "
    "reseeding; a replay has none. Our rows are CUDA graphs of the call with scalars on the "
    "device, after a check of their bits against the cpu backend. `% of copy` and `memory us` are "
    "against a copy in the pattern of cuda, `% of torch's copy` against that of a large tensor, "
    "both of random data; `issue us` is cuda's static instruction count at the full issue rate."
)
GENERATION_ELEMENTS = 64 * 256 * 1024


@dataclass(frozen=True)
class Generation:
    """64 directions of one L2-resident tensor, accumulated: generation and one fma each."""

    name: str  # "generation": by code path; "threads": by number of threads


def generation() -> Call:
    plan = mk.AdapterPlan([torch.zeros(256, 1024)], [mk.TensorSpec("hot", (256, 1024))])
    directions = [mk.Direction(0, step) for step in range(64)]
    coefficients = [1e-6] * len(directions)
    return lambda: mk.add_directions_(
        plan, directions=directions, coefficients=coefficients, backend="cpu"
    )


def torch_generation() -> Call:
    buffer = torch.empty(256, 1024)

    def run() -> None:
        for _ in range(64):
            buffer.normal_()

    return run


def on_isa(isa: str, call: Call) -> Call:
    """The call on one code path."""

    def run() -> object:
        _native.module().set_isa(isa)
        try:
            return call()
        finally:
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


def on_threads(count: int, call: Call) -> Call:
    def run() -> None:
        torch.set_num_threads(count)
        call()
        torch.set_num_threads(1)

    return run


# The CPU.


def cpu_candidates(case: Case | Generation) -> list[Candidate]:
    """The baseline, then our code paths; of "threads", our call on more and more of them."""
    if case.name == "threads":
        cores = len(os.sched_getaffinity(0))
        counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores]
        call = generation()
        return [
            Candidate(f"{count} threads", lambda count=count: on_threads(count, call))
            for count in counts
        ]
    if isinstance(case, Generation):
        return [
            Candidate("torch.normal_", torch_generation),
            *(
                Candidate(i, lambda i=i: on_isa(i, generation()), is_ours=True)
                for i in vector_isas()
            ),
        ]
    buffers = Buffers(case, "cpu", case.specs)
    tensors = [master.to(case.dtype, copy=True) for master in buffers.masters]
    ours = buffers.on_host("cpu")
    return [
        Candidate("torch loop", lambda: torch_loop(case.what, tensors, seed=0)),
        *(
            Candidate(
                isa,
                lambda isa=isa: on_isa(isa, ours),
                lambda _, isa=isa: on_isa(isa, lambda: complaint_of_cpu(case))(),
                is_ours=True,
            )
            for isa in vector_isas()
        ),
    ]


def measure_on_cpu(case: Case | Generation, bench: Bench) -> None:
    is_case = isinstance(case, Case)
    labels = {
        "what": WHAT_ON_CPU[case.what if is_case else case.name],
        "model": case.model if is_case else "-",
        "dtype": str(case.dtype).removeprefix("torch.") if is_case else "float32",
    }
    calls = bench.usable(labels, cpu_candidates(case))
    clock = time.perf_counter if case.name == "threads" else time.thread_time
    num_elements = case.num_elements if is_case else GENERATION_ELEMENTS
    for timing in interleave(calls, bench.rounds, stopwatch=HostClock(clock)).values():
        bench.rows.append(cpu_row(labels, timing, num_elements))


def cpu_row(labels: dict[str, str], timing: Timing, num_elements: int) -> Row:
    low, high = timing.p20_p80
    nanoseconds = 1e9 / num_elements
    return {
        **labels,
        "path": timing.name,
        "ratio": round(timing.ratio, 2),
        "ns_per_element": round(timing.p50 * nanoseconds, 3),
        "p20": round(low * nanoseconds, 3),
        "p80": round(high * nanoseconds, 3),
        "elements": num_elements,
    }


CPU_COLUMNS: dict[str, Callable[[Row], object]] = {
    "what": lambda r: r["what"],
    "dtype": lambda r: r["dtype"],
    "path": lambda r: r["path"],
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "ns per element": lambda r: f"{r['ns_per_element']:.2f}",
    "p20 - p80": lambda r: f"{r['p20']:.2f} - {r['p80']:.2f}",
}


# A GPU.


def gpu_candidates(
    case: Case, sets: list[Buffers], *, with_compile: bool = False
) -> Iterable[Candidate]:
    """The baselines, MeZO's loop first; then our rows, some with and without a graph."""

    def variants(make: Callable[[Buffers], Call], *, is_graph: bool) -> Callable[[], list[Call]]:
        return lambda: [as_graph(make(b)) if is_graph else make(b) for b in sets]

    for name, make in gpu_baselines(case).items():
        is_compiled = name == "torch.compile"
        if is_compiled and not with_compile:
            continue
        if name == LOOP:
            # The loop as MeZO runs it, launch by launch; and at its best, as a graph.
            yield Candidate(name, variants(make, is_graph=False))
            name = f"{LOOP} as a graph"
        yield Candidate(name, variants(make, is_graph=not is_compiled))
    for name, (backend, how) in OURS.items():
        if mk.backends()[backend] is not None:
            continue

        def ours(buffers: Buffers, backend: str = backend, how: dict[str, str] = how) -> Call:
            return buffers.on_device(backend, **how)

        wrong = complaint_of_gpu(case, backend, how)
        ways = {name: True}
        if name in LAUNCHED and case.what != "replay":
            ways[f"{name} without a graph"] = False
        for path, is_graph in ways.items():
            yield Candidate(
                path, variants(ours, is_graph=is_graph), lambda _, wrong=wrong: wrong, is_ours=True
            )


def measure_on_gpu(case: Case, bench: Bench) -> None:
    l2_bytes = bench.facts["l2_bytes"]
    sets = [Buffers(case, "cuda", case.specs) for _ in range(num_sets(case.nbytes, l2_bytes))]
    candidates = gpu_candidates(case, sets, with_compile=bench.options.with_compile)
    calls = bench.usable({"case": case.name}, candidates)
    if calls:
        timings = interleave(calls, bench.rounds, stopwatch=CudaEvents())
        bench.rows += gpu_rows(case, timings, bench.facts["roofline"], l2_bytes)


def gpu_rows(case: Case, timings: dict[str, Timing], roofline: Facts, l2_bytes: int) -> list[Row]:
    """Rows of the table; the model of bytes and instructions is that of our backends only."""
    rows = []
    peak = roofline["patterns"][case.nbytes // case.num_elements]
    issue_per_second = roofline["clock_hz"] * roofline["multiprocessors"] * 128
    is_cold = case.nbytes * num_sets(case.nbytes, l2_bytes) > 2 * l2_bytes
    for timing in timings.values():
        row: Row = {"case": case.name, "path": timing.name, **runner.microseconds(timing, 2)}
        row["l2"] = "cold" if is_cold else "hot"
        if timing.name.startswith(tuple(OURS)):
            row |= {
                "gb_per_s": round(case.nbytes / timing.p50 * 1e-9, 1),
                "percent_of_copy": round(100 * case.nbytes / timing.p50 / peak, 1),
                "percent_of_torch_copy": round(
                    100 * case.nbytes / timing.p50 / roofline["copy"], 1
                ),
                "memory_us": round(case.nbytes / peak * 1e6, 2),
                "issue_us": round(case.sass / issue_per_second * 1e6, 2),
            }
        rows.append(row)
    return rows


GPU_COLUMNS: dict[str, Callable[[Row], object]] = {
    "case": lambda r: r["case"],
    "path": lambda r: r["path"],
    "us [p20, p80]": lambda r: f"{r['p50_us']} [{r['p20_us']}, {r['p80_us']}]",
    "ratio": lambda r: r["ratio"],
    "GB/s": lambda r: r.get("gb_per_s", ""),
    "% of copy": lambda r: r.get("percent_of_copy", ""),
    "% of torch's copy": lambda r: r.get("percent_of_torch_copy", ""),
    "memory us": lambda r: r.get("memory_us", ""),
    "issue us": lambda r: r.get("issue_us", ""),
    "L2": lambda r: r.get("l2", ""),
}


def limits(roofline: Facts) -> str:
    """What was measured of the GPU itself; JSON has made strings of the patterns' bytes."""
    patterns = ", ".join(
        f"{n} B: {rate * 1e-9:.0f} GB/s" for n, rate in roofline["patterns"].items()
    )
    lanes = roofline["wide_multiplies"] / roofline["clock_hz"] / roofline["multiprocessors"]
    return (
        f"Limits measured here: copy {roofline['copy'] * 1e-9:.0f} GB/s; in the patterns of our "
        f"kernels {patterns}; IMAD.WIDE.U32 {lanes:.1f} lanes per clock and multiprocessor at "
        f"{roofline['clock_hz'] * 1e-9:.3f} GHz.\n\n"
    )


# Both.


def cases(options: argparse.Namespace) -> list[Case | Generation]:
    if options.device == "cuda":
        return gpu_cases()
    return [Generation("generation"), Generation("threads"), *cpu_cases(options.model)]


def begin(bench: Bench) -> None:
    if bench.device == "cuda":
        bench.facts["roofline"] = vars(measure_roofline())
        unusable = {backend: mk.backends()[backend] for backend, _ in OURS.values()}
        bench.notes += [f"{b}: {reason}" for b, reason in unusable.items() if reason is not None]


def measure(case: Case | Generation, bench: Bench) -> None:
    if bench.device == "cuda":
        measure_on_gpu(case, bench)
    else:
        measure_on_cpu(case, bench)


def report(facts: Facts) -> str:
    is_gpu = "roofline" in facts
    title, method = ("a GPU", GPU_METHOD) if is_gpu else ("the CPU", CPU_METHOD)
    rows = runner.table(facts["rows"], GPU_COLUMNS if is_gpu else CPU_COLUMNS)
    return (
        f"# Directions on {title}\n\n{method}\n\n{rows}\n\n"
        f"{limits(facts['roofline']) if is_gpu else ''}"
        f"{runner.notes_list(facts.get('notes', ()))}{facts_line(facts)}\n"
    )


def plan(found: list[Case | Generation]) -> str:
    """The cases as a table of what they move and compute."""
    columns: dict[str, Callable[[Row], object]] = {
        "case": lambda r: r["case"].name,
        "tensors": lambda r: len(r["case"].specs),
        "elements": lambda r: r["case"].num_elements,
        "bytes": lambda r: r["case"].nbytes,
        "lane instructions": lambda r: f"{r['case'].sass:.4g}",
        "passes of MeZO": lambda r: r["case"].num_passes,
    }
    rows = [{"case": case} for case in found if isinstance(case, Case)]
    meanings = "\n".join(f"* {what}: {meaning}" for what, meaning in MEANING.items())
    return f"{runner.table(rows, columns)}\n\n{meanings}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="smollm2-135m", help="of the CPU's cases, a name of bench.shapes"
    )
    parser.add_argument(
        "--with-compile",
        action="store_true",
        help="on a GPU, time torch.compile too: about 10 s of compiling for each flat case",
    )


QUESTION = Question(
    name="directions",
    description=__doc__,
    cases=cases,
    measure=measure,
    report=report,
    plan=plan,
    add_options=add_options,
    begin=begin,
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
