"""The GPU part of bench/paired.py: every form of the attention that is installed, label losses."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from itertools import accumulate

import torch

from bench.gpu_roofline import copy_bandwidth
from bench.paired_cases import (
    COPIES_LIMIT,
    GPU_LABELS,
    LIGER,
    Attention,
    AttentionCase,
    Call,
    Calls,
    gpu_attention,
    label_calls,
)
from bench.timing import Timing, as_graph, interleave_on_gpu, l2_reader, rebased

LABELS = {
    "sglang_triton": "SGLang triton, prefix per row",
    "flashinfer_per_row": "FlashInfer, prefix per row",
    "sdpa": "SDPA, prefix per row",
    "two_pass": "two passes (SGLang triton, merge_state)",
    "flashinfer": "flashinfer (paged + ragged, merge_state)",
    "triton": "triton (ours)",
}
NOT_SHARING = ("sglang_triton", "flashinfer_per_row", "sdpa")
# bf16 rounds weights, values and results by 2**-9 each.
TOLERANCE = 0.02
MIN_ROUNDS = 5
# Of one case, timing alone; cases that take microseconds reach the rounds that are asked for.
SECONDS_A_CASE = 0.5

Timer = Callable[[Calls, int], dict[str, Timing]]


def sglang_triton(one: Attention) -> Call:
    from bench.experiments.attention.two_pass import prefix_per_row

    options = {"plan": one.plan, "scale": one.scale, "out": one.out}
    return lambda: prefix_per_row(*one.tensors, **options)


def two_pass(one: Attention) -> Call:
    from bench.experiments.attention.two_pass import two_pass_attention

    options = {"plan": one.plan, "scale": one.scale, "out": one.out}
    return lambda: two_pass_attention(*one.tensors, **options)


def flashinfer_attention(one: Attention) -> Call:
    from bench.experiments.attention import flashinfer as backend

    return lambda: one.ours(backend)


def flashinfer_per_row(one: Attention) -> Call:
    """FlashInfer's paged prefill over a cache that holds the rows' own tokens, too."""
    from bench.experiments.attention import flashinfer as backend

    reason = backend.reason_against(one.q.device.type)
    if reason is not None:
        raise RuntimeError(reason)
    import flashinfer

    first_own, rows = len(one.k_cache), one.rows()
    own = (torch.arange(r.start, r.stop, device=one.q.device) + first_own for _, r in rows)
    indices = [torch.cat((slots, mine)) for (slots, _), mine in zip(rows, own, strict=True)]
    caches = ((one.k_cache, one.k_suffix), (one.v_cache, one.v_suffix))
    cache = tuple(torch.cat(parts).unsqueeze(1) for parts in caches)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(backend.workspace(one.q.device), "NHD")
    case = one.case
    wrapper.plan(
        qo_indptr=torch.tensor(one.plan.qo_indptr, dtype=torch.int32),
        paged_kv_indptr=torch.tensor([0, *accumulate(map(len, indices))], dtype=torch.int32),
        paged_kv_indices=torch.cat(indices).int(),
        paged_kv_last_page_len=torch.ones(len(rows), dtype=torch.int32),
        num_qo_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim_qk=case.dim,
        page_size=1,
        causal=True,
        sm_scale=one.scale,
        q_data_type=one.q.dtype,
        kv_data_type=one.q.dtype,
    )
    return lambda: wrapper.run(one.q, cache, out=one.out)


def sdpa(one: Attention) -> Call:
    if one.case.copies_nbytes > COPIES_LIMIT:
        raise RuntimeError(f"copies of the prefix for each row exceed {COPIES_LIMIT >> 30} GiB.")
    return one.batched_rows()


FORMS: dict[str, Callable[[Attention], Call]] = {
    "sglang_triton": sglang_triton,
    "flashinfer_per_row": flashinfer_per_row,
    "sdpa": sdpa,
    "two_pass": two_pass,
    "flashinfer": flashinfer_attention,
    "triton": lambda one: lambda: one.ours("triton"),
}


class Forms:
    """The forms that run here. One that fails before it ever ran is not tried again."""

    def __init__(self) -> None:
        self._left = dict(FORMS)
        self._ran: set[str] = set()

    def usable(self, one: Attention) -> tuple[Calls, list[str]]:
        """Calls whose results are right, and what is to say of the others."""
        calls: Calls = {}
        notes = []
        for name, make in list(self._left.items()):
            try:
                call = make(one)
                error = one.error(call())
            # Whatever another package raises: its row is left out, and the rest is measured.
            except Exception as problem:
                notes.append(f"{LABELS[name]}: left out. {_line(problem)}")
                if name not in self._ran:
                    del self._left[name]
                continue
            self._ran.add(name)
            if error <= TOLERANCE:
                calls[name] = call
            else:
                notes.append(f"FAIL {one.case}: {LABELS[name]}: relative RMS error {error:.3g}")
        return calls, notes


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {next(iter(str(problem).splitlines()), '')[:200]}"


def attention_rows(
    case: AttentionCase, timings: dict[str, Timing], copy_rate: float
) -> list[dict[str, object]]:
    """Rows of the table; ratios against the fastest form that does not share."""
    plain = [name for name in NOT_SHARING if name in timings] or list(timings)
    baseline = min(plain, key=lambda name: timings[name].p50)
    timings = rebased(timings, baseline)
    rows = []
    for name, timing in timings.items():
        path = LABELS[name] + (" (baseline)" if name == baseline else "")
        row = row_of("attention, a layer", str(case), path, timing)
        share = 100 * case.nbytes / copy_rate / timing.p50
        rows.append(row | {"percent_of_copy": round(share, 1)})
    return rows


def row_of(what: str, name: str, path: str, timing: Timing) -> dict[str, object]:
    """A row of the table."""
    p20, p80 = (round(seconds * 1e6, 1) for seconds in timing.p20_p80)
    shown = {"p50_us": round(timing.p50 * 1e6, 1), "p20_us": p20, "p80_us": p80}
    return {"what": what, "case": name, "path": path, "ratio": round(timing.ratio, 2), **shown}


def point_of(case: AttentionCase, timings: dict[str, Timing]) -> dict[str, object]:
    """The same for whoever chooses a form by shape."""
    return {
        "prefix": case.prefix[0],
        "suffix": case.suffix,
        "rows": case.num_rows,
        "gqa": case.gqa,
        "head_dim": case.dim,
        "us": {name: round(timing.p50 * 1e6, 2) for name, timing in timings.items()},
    }


def label_rows(
    num_tokens: int,
    vocab: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    timer: Timer,
) -> tuple[list[dict[str, object]], list[str]]:
    """Rows of label losses with the memory that each takes beside its arguments."""
    calls, notes = label_calls(num_tokens, vocab, dim, dtype, device), []
    name = f"T {num_tokens}, V {vocab}, D_in {dim}"
    expected = calls["linear + log_softmax"]().float()
    for path in (LIGER, "label_nll"):
        if path not in calls:
            continue
        try:
            error = float((calls[path]().float() - expected).abs().max())
        except Exception as problem:
            notes.append(f"{path}: left out. {_line(problem)}")
            del calls[path]
            continue
        # Logits of bf16 are off by up to 2**-9 of their size, about 10.
        if not error <= 0.2:
            notes.append(f"FAIL {name}: {path}: losses differ by {error:.3g}")
            del calls[path]
    peaks = {path: peak_mib(call) for path, call in calls.items()}
    rows = [
        row_of("label loss", name, path, timing) | {"peak_mib": peaks[path]}
        for path, timing in timer(calls, rounds).items()
    ]
    return rows, notes


def peak_mib(call: Call) -> float | None:
    """The most memory that a call has allocated at once; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / (1 << 20), 1)


def graphs_on_gpu(flush: Call, notes: list[str]) -> Timer:
    """A timer: CUDA graphs where a call can be captured, between events, caches flushed."""

    def as_graph_or_plain(name: str, call: Call) -> Call:
        # Liger asks for a number on the host, which a capture forbids.
        if name == LIGER:
            return call
        try:
            return as_graph(call)
        except RuntimeError as problem:
            notes.append(f"{LABELS.get(name, name)}: without a graph. {_line(problem)}")
            return call

    def timer(calls: Calls, rounds: int) -> dict[str, Timing]:
        graphs = {name: as_graph_or_plain(name, call) for name, call in calls.items()}
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in graphs.values():
            call()
        torch.cuda.synchronize()
        fitting = int(SECONDS_A_CASE / (time.perf_counter() - start))
        lists = {name: [call] for name, call in graphs.items()}
        rounds = max(MIN_ROUNDS, min(rounds, fitting))
        return interleave_on_gpu(lists, rounds, warm_up=1, before=flush)

    return timer


def gpu_rows(
    rounds: int, budget_s: float, *, quick: bool = False
) -> tuple[list[dict], list[dict], list[str]]:
    """(rows, points, notes) of this GPU; what the budget leaves no time for is named."""
    started = time.monotonic()
    copy_rate = copy_bandwidth()
    notes = [f"Copy: {copy_rate * 1e-9:.0f} GB/s, read and written."]
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    timer = graphs_on_gpu(l2_reader(l2_bytes), notes)
    rows: list[dict] = []
    for shape in GPU_LABELS:
        measured, said = label_rows(*shape, torch.bfloat16, "cuda", rounds, timer)
        rows += measured
        notes += said
    forms, cases = Forms(), gpu_attention(quick=quick)
    points: list[dict] = []
    for i, case in enumerate(cases):
        if time.monotonic() - started > budget_s:
            notes.append(f"Left out for want of time: {len(cases) - i} of {len(cases)} shapes.")
            break
        try:
            calls, said = forms.usable(Attention(case, torch.bfloat16, "cuda"))
            notes += said
            timings = timer(calls, rounds)
            rows += attention_rows(case, timings, copy_rate)
            points.append(point_of(case, timings))
        except Exception as problem:
            traceback.print_exc()
            notes.append(f"FAIL {case}: {_line(problem)}")
        # Graphs and copies of a case are gone before the next one.
        calls = timings = None
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{time.monotonic() - started:.0f} s: {case}", file=sys.stderr, flush=True)
    return rows, points, list(dict.fromkeys(notes))
