"""Attention of rows that share prefixes and label losses, against what runs without them.

`python -m bench.paired` prints the tables of this host and writes bench/results/<device>/paired.*;
`--dry-run` writes nothing, and on a host without a GPU also lists the GPU cases.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import mezo_kernels as mk
from bench.timing import environment, gpu_environment, interleave

RESULTS = Path(__file__).parent / "results"
# H, H_kv, D of SmolLM2-135M, the model of the demo; V and D_in of its lm_head.
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
VOCAB, HIDDEN = 49152, 576

Call = Callable[[], object]


@dataclass(frozen=True)
class AttentionCase:
    """Groups of equal rows: prefix lengths drawn from a range, suffixes of one length."""

    prefix: tuple[int, int]
    suffix: int
    num_groups: int = 16
    num_rows: int = 2
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    dim: int = HEAD_DIM

    def __str__(self) -> str:
        low, high = self.prefix
        prefix = str(low) if low == high else f"{low}-{high}"
        return (
            f"{self.num_groups} groups x {self.num_rows} rows, prefix {prefix}, "
            f"suffix {self.suffix}, heads {self.heads}/{self.kv_heads} x {self.dim}"
        )


class Attention:
    """The tensors of a case and the calls to compare."""

    def __init__(self, case: AttentionCase, dtype: torch.dtype, device: str) -> None:
        choose = random.Random(str(case))
        lens = [choose.randint(*case.prefix) for _ in range(case.num_groups)]
        num_rows, num_slots = case.num_groups * case.num_rows, sum(lens)
        num_tokens = num_rows * case.suffix
        # Each prefix is a run of slots, as a fresh cache hands them out, the runs in any order.
        runs = list(torch.arange(num_slots).split(lens))
        choose.shuffle(runs)
        slots = torch.cat(runs).to(device)
        ranges = {
            "qo_indptr": [case.suffix * row for row in range(num_rows + 1)],
            "group_indptr": list(range(0, num_rows + 1, case.num_rows)),
            "kv_indptr": [0, *accumulate(len(run) for run in runs)],
        }
        self.make_plan = lambda: mk.SharedPrefixPlan(**ranges, kv_indices=slots)
        self.plan = self.make_plan()
        self.case, self.scale = case, case.dim**-0.5

        def normal(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, case.dim, device=device).to(dtype)

        self.q = normal(num_tokens, case.heads)
        self.k_suffix, self.v_suffix = (normal(num_tokens, case.kv_heads) for _ in range(2))
        self.k_cache, self.v_cache = (normal(num_slots, case.kv_heads) for _ in range(2))
        self.out = torch.empty_like(self.q)

    def ours(self) -> torch.Tensor:
        tensors = (self.q, self.k_suffix, self.v_suffix, self.k_cache, self.v_cache)
        return mk.shared_prefix_attention(*tensors, plan=self.plan, scale=self.scale, out=self.out)

    def ours_with_new_plan(self) -> torch.Tensor:
        """What the first layer of a batch costs."""
        self.plan = self.make_plan()
        return self.ours()

    def rows(self) -> list[tuple[torch.Tensor, range]]:
        """(slots of the prefix, own tokens) of each row."""
        plan = self.plan
        return [
            (plan.prefix_slots(group), plan.row_tokens(row))
            for group in range(plan.num_groups)
            for row in plan.group_rows(group)
        ]

    def keys_and_values(self, slots: torch.Tensor, own: range) -> tuple[torch.Tensor, torch.Tensor]:
        """`[1, H_kv, P + S, D]` each."""
        mine = slice(own.start, own.stop)
        k = torch.cat((self.k_cache[slots], self.k_suffix[mine]))
        v = torch.cat((self.v_cache[slots], self.v_suffix[mine]))
        return k.movedim(0, 1)[None], v.movedim(0, 1)[None]

    def torch_native(self) -> torch.Tensor:
        """A request at a time, its queries padded to the whole length, as SGLang's torch_native."""
        out = torch.empty_like(self.q)
        for slots, own in self.rows():
            k, v = self.keys_and_values(slots, own)
            q = torch.empty(1, self.case.heads, k.shape[2], self.case.dim, dtype=self.q.dtype)
            q[0, :, len(slots) :] = self.q[own.start : own.stop].movedim(0, 1)
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
            out[own.start : own.stop] = attended[0, :, len(slots) :].movedim(0, 1)
        return out

    def row_loop(self) -> torch.Tensor:
        """A row at a time, its own queries only."""
        out = torch.empty_like(self.q)
        for slots, own in self.rows():
            k, v = self.keys_and_values(slots, own)
            q = self.q[own.start : own.stop].movedim(0, 1)[None]
            mask = torch.ones(len(own), k.shape[2], dtype=torch.bool).tril(len(slots))
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True
            )
            out[own.start : own.stop] = attended[0].movedim(0, 1)
        return out

    def batched_rows(self) -> Call:
        """All rows in one call over copies of the prefix: what does not share, at its best."""
        pairs = [self.keys_and_values(slots, own) for slots, own in self.rows()]
        k, v = (torch.cat(parts).contiguous() for parts in zip(*pairs, strict=True))
        num_rows, length = len(pairs), k.shape[2]
        q = self.q.view(num_rows, -1, *self.q.shape[1:]).transpose(1, 2).contiguous()
        bias = causal_lower_right(q.shape[2], length)
        return lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=self.scale, enable_gqa=True
        ).transpose(1, 2)


Calls = dict[str, Call]


def label_calls(num_tokens: int, vocab: int, dim: int, dtype: torch.dtype, device: str) -> Calls:
    """F.linear and log_softmax, the product alone, ours."""
    hidden = torch.randn(num_tokens, dim, device=device).to(dtype)
    lm_head = (torch.randn(vocab, dim, device=device) * 3 / dim**0.5).to(dtype)
    targets = torch.randint(0, vocab, (num_tokens,), device=device)

    def baseline() -> torch.Tensor:
        logits = F.linear(hidden, lm_head).float()
        return F.cross_entropy(logits, targets, reduction="none")

    return {
        "linear + log_softmax": baseline,
        "linear alone": lambda: F.linear(hidden, lm_head),
        "label_nll": lambda: mk.label_nll(hidden, lm_head, targets),
    }


CPU_ATTENTION = [
    AttentionCase(prefix, suffix)
    for prefix, suffix in product(((20, 80), (200, 400), (20, 400)), (1, 3, 8))
]
CPU_LABELS = (32, 96, 512)
GPU_ATTENTION = [
    AttentionCase((prefix, prefix), suffix, 8, num_rows, heads, kv_heads, 128)
    for prefix, suffix, num_rows, (heads, kv_heads) in product(
        (256, 2048, 8192, 32768), (1, 8, 32, 128), (2, 8, 32), ((8, 8), (32, 8), (64, 8))
    )
    # 16 GiB for the copies that the baseline reads.
    if 8 * num_rows * prefix * kv_heads * 128 * 4 <= 16 << 30
]
GPU_LABELS = [(tokens, 131072, 4096) for tokens in (32, 512, 4096)]


def check(name: str, results: Sequence[torch.Tensor], limit: float) -> None:
    """Refuse to time results that differ."""
    error = max(float((r.float() - results[0].float()).abs().max()) for r in results[1:])
    if not error <= limit:
        raise SystemExit(f"FAIL: {name}: results differ by {error:.3g} > {limit:.3g}")


def measure(what: str, name: str, calls: Calls, rounds: int, **timer: object) -> list[dict]:
    """A row of the table for each call; the first is the baseline."""
    rows = []
    for timing in interleave(calls, rounds, **timer).values():
        p20, p80 = (round(seconds * 1e6, 1) for seconds in timing.p20_p80)
        shown = {"p50_us": round(timing.p50 * 1e6, 1), "p20_us": p20, "p80_us": p80}
        ratio = round(timing.ratio, 2)
        rows.append({"what": what, "case": name, "path": timing.name, "ratio": ratio, **shown})
    return rows


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
    return rows


def captured(call: Call) -> Call:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def gpu_rows(rounds: int) -> list[dict]:
    rows = []
    for case in GPU_ATTENTION:
        one = Attention(case, torch.bfloat16, "cuda")
        calls = {"SDPA, prefix per row": one.batched_rows(), "shared_prefix_attention": one.ours}
        baseline = calls["SDPA, prefix per row"]().reshape(one.q.shape)
        check(str(case), [baseline, one.ours()], 0.05)
        graphs = {name: captured(call) for name, call in calls.items()}
        rows += measure("attention, a layer", str(case), graphs, rounds, clock=gpu_clock)
        del one, calls, graphs
    for num_tokens, vocab, dim in GPU_LABELS:
        calls = label_calls(num_tokens, vocab, dim, torch.bfloat16, "cuda")
        name = f"T {num_tokens}, V {vocab}, D_in {dim}"
        check(name, [calls["linear + log_softmax"](), calls["label_nll"]()], 0.2)
        graphs = {name: captured(call) for name, call in calls.items()}
        rows += measure("label loss", name, graphs, rounds, clock=gpu_clock)
    return rows


def report(rows: list[dict], where: dict[str, object]) -> str:
    lines = [
        "| what | case | path | ratio | us | p20 - p80 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['what']} | {r['case']} | {r['path']} | {r['ratio']:.2f} | {r['p50_us']:.0f} | "
        f"{r['p20_us']:.0f} - {r['p80_us']:.0f} |"
        for r in rows
    ]
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if key != "cpu_flags")
    return (
        "# Shared prefixes and label losses\n\n"
        "Ratios: the first path's time over this one's, median of per-round ratios, interleaved in "
        "one process. On a CPU: one thread, CPU time of that thread, fp32. On a GPU: bf16, CUDA "
        "graphs, L2 hot. Written by `python -m bench.paired`.\n\n"
        + "\n".join(lines)
        + f"\n\nMeasured with: {facts}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="default bench/results/<device>")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    has_gpu = torch.cuda.is_available()
    if arguments.dry_run and not has_gpu:
        for case in GPU_ATTENTION:
            print(f"gpu attention: {case}")
        for num_tokens, vocab, dim in GPU_LABELS:
            print(f"gpu label loss: T {num_tokens}, V {vocab}, D_in {dim}")
    where = environment()
    device = "cpu"
    if has_gpu:
        device = torch.cuda.get_device_name().lower().replace(" ", "-")
        where = gpu_environment()
    rows = gpu_rows(arguments.rounds) if has_gpu else cpu_rows(arguments.rounds)
    text = report(rows, where)
    print(text)
    if arguments.dry_run:
        return
    directory = arguments.out or RESULTS / device
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "paired.md").write_text(text)
    (directory / "paired.json").write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
