"""Attention of rows that share prefixes, label losses, LoRA of pairs, against what runs without.

`python -m bench.paired` prints the tables of this host and writes bench/results/<device>/paired.*;
the JSON has the times of each form by shape, too, under "points". `--dry-run` lists the cases.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from bench.paired_cases import (
    CPU_ATTENTION,
    CPU_LABELS,
    GPU_LABELS,
    Attention,
    Calls,
    gpu_attention,
    label_calls,
)
from bench.paired_gpu import gpu_rows, row_of
from bench.timing import environment, gpu_environment, interleave
from mezo_kernels.cpu import SegmentedLora

RESULTS = Path(__file__).parent / "results"
# V and D_in of the lm_head of SmolLM2-135M, the model of the demo.
VOCAB, HIDDEN = 49152, 576
# (D_in, D_out of the stacked modules) of its linear layers; tokens of the demo's activated and
# exact steps.
MODULES = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))
RANK, CPU_LORA = 8, (96, 832)
CPU_METHOD = (
    "Ratios: the first path's time over this one's, median of per-round ratios, interleaved in one "
    "process. One thread, CPU time of that thread, fp32."
)
GPU_METHOD = (
    "Ratios: the baseline's time over this one's, median of per-round ratios, interleaved in one "
    "process. The baseline of attention is the fastest form that reads the prefix for each row, of "
    "those that run here; of label losses the first path. bf16, CUDA graphs between events "
    "(Liger's loss without a graph, under no_grad), L2 cold: twice its size is read before each "
    "call. `% of copy`: the time of a copy of the bytes that must move (prefix once a group, "
    "suffix, q, result) over the time measured; few queries a prefix are bound by it, many by "
    "arithmetic. `peak MiB`: what a call allocates at most."
)


def check(name: str, results: Sequence[torch.Tensor], limit: float) -> None:
    """Refuse to time results that differ."""
    error = max(float((r.float() - results[0].float()).abs().max()) for r in results[1:])
    if not error <= limit:
        raise SystemExit(f"FAIL: {name}: results differ by {error:.3g} > {limit:.3g}")


def measure(what: str, name: str, calls: Calls, rounds: int, **timer: object) -> list[dict]:
    """A row of the table for each call; the first is the baseline."""
    timings = interleave(calls, rounds, **timer)
    return [row_of(what, name, timing.name, timing) for timing in timings.values()]


def cpu_rows(rounds: int) -> list[dict]:
    rows = []
    for case in CPU_ATTENTION:
        one = Attention(case, torch.float32, "cpu")
        check(str(case), [one.row_loop(), one.torch_native(), one.ours()], 1e-5)
        calls = {
            "SDPA per request (torch_native)": one.torch_native,
            "SDPA per row, own queries": one.row_loop,
            "shared_prefix_attention": one.ours,
            "the same with a new plan": one.ours_with_new_plan,
        }
        rows += measure("attention, a layer", str(case), calls, rounds)
    for num_tokens in CPU_LABELS:
        calls = label_calls(num_tokens, VOCAB, HIDDEN, torch.float32, "cpu")
        name = f"T {num_tokens}, V {VOCAB}, D_in {HIDDEN}"
        check(name, [calls["linear + log_softmax"](), calls["label_nll"]()], 2e-5)
        rows += measure("label loss", name, calls, max(5, rounds // 3))
    for num_tokens in CPU_LORA:
        name = f"T {num_tokens}, r {RANK}, the modules of a layer"
        calls, outputs = lora_calls(num_tokens)
        check(name, outputs, 1e-4)
        rows += measure("LoRA of a pair", name, calls, rounds)
    return rows


def lora_calls(num_tokens: int) -> tuple[Calls, list[torch.Tensor]]:
    """All linear modules of a layer of SmolLM2-135M for two adapters, by each path."""
    segments = [0, num_tokens // 2, num_tokens]
    lora = SegmentedLora(segments, [2, 3], [2.0, 2.0], RANK)
    modules = []
    for depth, widths in MODULES:
        offsets = [sum(widths[:i]) for i in range(len(widths) + 1)]
        shapes = ((4, len(widths) * RANK, depth), (4, offsets[-1], RANK))
        a, b = (torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)
        x, base = torch.randn(num_tokens, depth), torch.randn(num_tokens, offsets[-1])
        modules.append((x, a, b, base, offsets))

    def loop(x, a, b, out, offsets) -> torch.Tensor:
        """Each adapter and each stacked module apart, as SGLang's torch_native backend."""
        for slot, (start, stop) in zip((2, 3), pairwise(segments), strict=True):
            h = 2.0 * (x[start:stop] @ a[slot].T)
            for i, (first, last) in enumerate(pairwise(offsets)):
                own = h[:, i * RANK : (i + 1) * RANK]
                out[start:stop, first:last].addmm_(own, b[slot, first:last].T)
        return out

    def ours(x, a, b, out, offsets) -> torch.Tensor:
        lora.expand_(out, lora.shrink(x, a, len(offsets) - 1), b, offsets)
        return out

    outputs = [
        torch.cat([path(x, a, b, base.clone(), o) for x, a, b, base, o in modules], dim=1)
        for path in (loop, ours)
    ]
    calls = {
        "addmm per adapter and module (torch_native)": lambda: [loop(*m) for m in modules],
        "SegmentedLora": lambda: [ours(*m) for m in modules],
    }
    return calls, outputs


def report(rows: list[dict], where: dict[str, object], notes: Sequence[str] = ()) -> str:
    # On a CPU no row has these.
    extra = {"percent_of_copy": "% of copy", "peak_mib": "peak MiB"}
    extra = {key: title for key, title in extra.items() if any(key in row for row in rows)}
    titles = ["what", "case", "path", "ratio", "us", "p20 - p80", *extra.values()]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for r in rows:
        times = f"{r['p50_us']:.0f} | {r['p20_us']:.0f} - {r['p80_us']:.0f}"
        cells = [r["what"], r["case"], r["path"], f"{r['ratio']:.2f}", times]
        lines.append(f"| {' | '.join([*cells, *(str(r.get(key, '')) for key in extra)])} |")
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if key != "cpu_flags")
    said = "".join(f"* {note}\n" for note in notes)
    return (
        "# Shared prefixes, label losses, LoRA of pairs\n\n"
        f"{GPU_METHOD if extra else CPU_METHOD} Written by `python -m bench.paired`.\n\n"
        + "\n".join(lines)
        + (f"\n\n{said}" if said else "\n")
        + f"\nMeasured with: {facts}.\n"
    )


def plan_of() -> list[str]:
    """The cases, one a line."""
    lines = [f"cpu attention: {case}" for case in CPU_ATTENTION]
    lines += [f"cpu label loss: T {t}, V {VOCAB}, D_in {HIDDEN}" for t in CPU_LABELS]
    lines += [f"cpu LoRA of a pair: T {t}, r {RANK}" for t in CPU_LORA]
    lines += [f"gpu attention: {case}, {case.nbytes} bytes" for case in gpu_attention()]
    lines += [f"gpu label loss: T {t}, V {vocab}, D_in {dim}" for t, vocab, dim in GPU_LABELS]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="default bench/results/<device>")
    parser.add_argument("--name", default="paired", help="of the files")
    parser.add_argument("--quick", action="store_true", help="on a GPU a dozen shapes only")
    parser.add_argument("--budget", type=float, default=170.0, help="seconds on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="list the cases, measure nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        print("\n".join(plan_of()))
        return 0
    torch.manual_seed(0)
    torch.set_num_threads(1)
    points: list[dict] = []
    notes: list[str] = []
    if torch.cuda.is_available():
        device, where = torch.cuda.get_device_name().lower().replace(" ", "-"), gpu_environment()
        rows, points, notes = gpu_rows(arguments.rounds, arguments.budget, quick=arguments.quick)
    else:
        device, where = "cpu", environment()
        rows = cpu_rows(arguments.rounds)
    text = report(rows, where, notes)
    print(text)
    directory = arguments.out or RESULTS / device
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{arguments.name}.md").write_text(text)
    facts = {**where, "notes": notes, "points": points, "rows": rows}
    (directory / f"{arguments.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(note.startswith("FAIL") for note in notes))


if __name__ == "__main__":
    sys.exit(main())
