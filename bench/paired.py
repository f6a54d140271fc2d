"""Attention of rows that share prefixes, label losses, LoRA of pairs, against what runs without.

`python -m bench.paired` prints the table of this host and writes bench/results/<device>/paired.*;
the JSON of a GPU also has the times of each attention kernel by shape, under "points".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from bench import runner
from bench.attention_kernels import KERNELS, LABELS, NOT_SHARING
from bench.environment import facts_line
from bench.gpu.roofline import copy_bandwidth
from bench.paired_cases import (
    LIGER,
    Attention,
    AttentionCase,
    LabelCase,
    LoraCase,
    PairLora,
    cpu_cases,
    gpu_cases,
    label_calls,
)
from bench.runner import Bench, Candidate, Facts, Question, Row
from bench.timing import (
    Call,
    CudaEvents,
    Timing,
    as_graph,
    interleave,
    l2_reader,
    rebased,
)

CPU_METHOD = (
    "Ratios: the first path's time over this one's, median of per-round ratios, interleaved in one "
    "process. One thread, CPU time of that thread, fp32."
)
GPU_METHOD = (
    "Ratios: the baseline's time over this one's, median of per-round ratios, interleaved in one "
    "process. The baseline of attention is the fastest kernel that reads the prefix for each row, "
    "of those that run here; of label losses the first path. bf16, CUDA graphs between events "
    "(Liger's loss without a graph, under no_grad), L2 cold: twice its size is read before each "
    "call. `% of copy`: the time of a copy of the bytes that must move (prefix once per group, "
    "suffix, q, result) over the time measured; few queries per prefix are bound by it, many by "
    "arithmetic. `peak MiB`: what a call allocates at most."
)
WHAT = {AttentionCase: "attention, per layer", LabelCase: "label loss", LoraCase: "LoRA of a pair"}
# bf16 rounds weights, values and results by 2**-9 each; logits of bf16 are off by up to 2**-9 of
# their size, about 10.
ATTENTION_LIMIT = {"cpu": 1e-5, "cuda": 0.02}
LABEL_LIMIT = {"cpu": 2e-5, "cuda": 0.2}
LORA_LIMIT = 1e-4
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
MIN_ROUNDS = 5
# Of one case, timing only; cases that take microseconds reach the rounds that are asked for.
SECONDS_PER_CASE = 0.5


def labels_of(case: AttentionCase | LabelCase | LoraCase) -> dict[str, str]:
    return {"what": WHAT[type(case)], "case": str(case)}


def attention_candidates(one: Attention, device: str) -> list[Candidate]:
    """On a CPU what torch offers and ours; on a GPU every kernel that is installed."""

    def complaint(call: Call) -> str | None:
        error = one.error(call())
        return f"relative RMS error {error:.3g}" if not error <= ATTENTION_LIMIT[device] else None

    if device == "cuda":
        makes = {name: lambda make=make: make(one) for name, make in KERNELS.items()}
    else:
        makes = {
            "SDPA per request (torch_native)": lambda: one.torch_native,
            "SDPA per row, own queries": lambda: one.row_loop,
            "shared_prefix_attention": lambda: one.ours,
            "the same with a new plan": lambda: one.ours_with_new_plan,
        }
    return [Candidate(name, make, complaint) for name, make in makes.items()]


def label_candidates(case: LabelCase, device: str) -> list[Candidate]:
    calls = label_calls(case, DTYPE[device], device)
    expected = calls["linear + log_softmax"]().float()

    def complaint(call: Call) -> str | None:
        error = float((call().float() - expected).abs().max())
        return f"losses differ by {error:.3g}" if not error <= LABEL_LIMIT[device] else None

    return [
        Candidate(
            name,
            lambda call=call: call,
            complaint if name in (LIGER, "label_nll") else None,
        )
        for name, call in calls.items()
    ]


def lora_candidates(one: PairLora) -> list[Candidate]:
    expected = one.added(one.loop)

    def complaint(call: Call) -> str | None:
        error = float((one.added(call) - expected).abs().max())
        return f"outputs differ by {error:.3g}" if not error <= LORA_LIMIT else None

    return [
        Candidate("addmm per adapter and module (torch_native)", lambda: one.loop),
        Candidate("SegmentedLora", lambda: one.ours, complaint, is_ours=True),
    ]


def row_of(labels: dict[str, str], path: str, timing: Timing) -> Row:
    return {**labels, "path": path, **runner.microseconds(timing)}


def measure(case: AttentionCase | LabelCase | LoraCase, bench: Bench) -> None:
    labels, device = labels_of(case), bench.device
    if isinstance(case, AttentionCase):
        calls = bench.usable(
            labels, attention_candidates(Attention(case, DTYPE[device], device), device)
        )
        timings = time_calls(calls, bench)
        if device == "cuda":
            bench.rows += attention_rows(case, timings, bench.facts["copy_bytes_per_second"])
            bench.facts["points"].append(point_of(case, timings))
            return
    elif isinstance(case, LabelCase):
        calls = bench.usable(labels, label_candidates(case, device))
        if device == "cuda":
            peaks = {name: peak_mib(call) for name, call in calls.items()}
            timings = time_calls(calls, bench)
            bench.rows += [
                row_of(labels, n, timing) | {"peak_mib": peaks[n]} for n, timing in timings.items()
            ]
            return
        timings = interleave(calls, max(5, bench.rounds // 3))
    else:
        timings = interleave(bench.usable(labels, lora_candidates(PairLora(case))), bench.rounds)
    bench.rows += [row_of(labels, name, timing) for name, timing in timings.items()]


def time_calls(calls: dict[str, Call], bench: Bench) -> dict[str, Timing]:
    """On a GPU as CUDA graphs between events with caches flushed, as often as the time allows."""
    if bench.device == "cpu":
        return interleave(calls, bench.rounds)

    def as_graph_or_plain(name: str, call: Call) -> Call:
        # Liger asks for a number on the host, which a capture forbids.
        if name == LIGER:
            return call
        try:
            return as_graph(call)
        except RuntimeError as problem:
            name = LABELS.get(name, name)
            bench.notes.append(f"{name}: without a graph. {runner.line_of(problem)}")
            return call

    graphs = {name: as_graph_or_plain(name, call) for name, call in calls.items()}
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in graphs.values():
        call()
    torch.cuda.synchronize()
    fitting = int(SECONDS_PER_CASE / (time.perf_counter() - start))
    rounds = max(MIN_ROUNDS, min(bench.rounds, fitting))
    flush = l2_reader(bench.facts["l2_bytes"])
    return interleave(graphs, rounds, warm_up=1, stopwatch=CudaEvents(before=flush))


def attention_rows(case: AttentionCase, timings: dict[str, Timing], copy_rate: float) -> list[Row]:
    """Rows of the table; ratios against the fastest kernel that does not share."""
    plain = [name for name in NOT_SHARING if name in timings] or list(timings)
    baseline = min(plain, key=lambda name: timings[name].p50)
    rows = []
    for name, timing in rebased(timings, baseline).items():
        path = LABELS[name] + (" (baseline)" if name == baseline else "")
        share = 100 * case.nbytes / copy_rate / timing.p50
        rows.append(row_of(labels_of(case), path, timing) | {"percent_of_copy": round(share, 1)})
    return rows


def point_of(case: AttentionCase, timings: dict[str, Timing]) -> Row:
    """The same for whoever chooses an attention kernel by shape."""
    return {
        "prefix": case.prefix[0],
        "suffix": case.suffix,
        "rows": case.num_rows,
        "gqa": case.gqa,
        "head_dim": case.dim,
        "us": {name: round(timing.p50 * 1e6, 2) for name, timing in timings.items()},
    }


def peak_mib(call: Call) -> float:
    """The most memory that a call has allocated at once on the GPU."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / (1 << 20), 1)


COLUMNS: dict[str, Callable[[Row], object]] = {
    "what": lambda r: r["what"],
    "case": lambda r: r["case"],
    "path": lambda r: r["path"],
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "us": lambda r: f"{r['p50_us']:.0f}",
    "p20 - p80": lambda r: f"{r['p20_us']:.0f} - {r['p80_us']:.0f}",
}
GPU_COLUMNS = COLUMNS | {
    "% of copy": lambda r: r.get("percent_of_copy", ""),
    "peak MiB": lambda r: r.get("peak_mib", ""),
}


def cases(options: argparse.Namespace) -> Sequence[AttentionCase | LabelCase | LoraCase]:
    return gpu_cases(quick=options.quick) if options.device == "cuda" else cpu_cases()


def begin(bench: Bench) -> None:
    bench.facts["points"] = []
    if bench.device == "cuda":
        rate = bench.facts["copy_bytes_per_second"] = copy_bandwidth()
        bench.notes.append(f"Copy: {rate * 1e-9:.0f} GB/s, read and written.")


def plan(found: Sequence[AttentionCase | LabelCase | LoraCase]) -> str:
    """The cases, one per line; attention with the 16-bit bytes that must move."""
    return "\n".join(
        f"{case.name}, {case.nbytes} bytes" if isinstance(case, AttentionCase) else case.name
        for case in found
    )


def report(facts: Facts) -> str:
    is_gpu = "copy_bytes_per_second" in facts
    return (
        "# Shared prefixes, label losses, LoRA of pairs\n\n"
        f"{GPU_METHOD if is_gpu else CPU_METHOD} Written by `python -m bench.paired`.\n\n"
        f"{runner.table(facts['rows'], GPU_COLUMNS if is_gpu else COLUMNS)}\n\n"
        f"{runner.notes_list(facts['notes'])}{facts_line(facts)}\n"
    )


QUESTION = Question(
    name="paired",
    description=__doc__,
    cases=cases,
    measure=measure,
    report=report,
    plan=plan,
    add_options=lambda parser: parser.add_argument(
        "--quick", action="store_true", help="on a GPU a dozen shapes of attention only"
    ),
    begin=begin,
    budget_s=170.0,
    needs_all_cases=False,
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
