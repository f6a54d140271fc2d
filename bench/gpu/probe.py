"""Questions that only a GPU answers, about a minute in all.

    python -m bench.gpu.probe --out DIR [--parts overhead,host,lanes,attention,nll] [--budget 60]

Each answer is one JSON line of DIR/probe.jsonl, written at once, and one printed line. --compile
compiles the Triton variants for sm_90 on a host without a GPU and times nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

import mezo_kernels as mk
from bench.gpu.roofline import Library, seconds
from bench.paired_cases import Attention, AttentionCase
from bench.timing import Call, as_graph

STARTED = time.monotonic()
ATTENTION = {
    "OPT-13B activated b16": AttentionCase((40, 40), 3, 16, 2, 40, 40, 128),
    "OPT-13B exact b16": AttentionCase((0, 0), 33, 32, 1, 40, 40, 128),
    "OPT-13B exact b16 long": AttentionCase((0, 0), 400, 32, 1, 40, 40, 128),
    "Llama activated b16": AttentionCase((40, 40), 3, 16, 2, 32, 8, 128),
    "Llama P2048 S8 x2": AttentionCase((2048, 2048), 8, 8, 2, 32, 8, 128),
    "Llama P8192 S32 x2": AttentionCase((8192, 8192), 32, 8, 2, 32, 8, 128),
    "Llama P8192 S1 x32": AttentionCase((8192, 8192), 1, 8, 32, 32, 8, 128),
}
NLL = ((32, 50272, 2048), (32, 50272, 5120), (32, 128256, 4096), (2048, 128256, 4096))
# What tiles_of says stands first; the others change it.
ATTENTION_TILES: dict[str, dict[str, int]] = {
    "as is": {},
    "2 stages": {"num_stages": 2},
    "3 stages": {"num_stages": 3},
    "4 stages": {"num_stages": 4},
    "no limit of registers": {"maxnreg": 255},
    "own tokens 16 at a time": {"BLOCK_S": 16},
    "own tokens 64 at a time": {"BLOCK_S": 64},
}
NLL_TILES: dict[str, dict[str, int]] = {
    "as is": {},
    "64 x 128, 8 warps": {"BLOCK_T": 64, "BLOCK_V": 128, "num_warps": 8, "num_stages": 3},
    "64 x 128, 4 warps, 4 stages": {
        "BLOCK_T": 64,
        "BLOCK_V": 128,
        "num_warps": 4,
        "num_stages": 4,
    },
    "128 x 128, 8 warps": {"BLOCK_T": 128, "BLOCK_V": 128, "num_warps": 8, "num_stages": 3},
    "128 x 256, 8 warps": {"BLOCK_T": 128, "BLOCK_V": 256, "num_warps": 8, "num_stages": 3},
}


class OutOfTimeError(Exception):
    """The budget is spent; what follows is left out."""


class Log:
    def __init__(self, out: Path | None, budget: float = float("inf")) -> None:
        self._path = None
        self._budget = budget
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._path = out / "probe.jsonl"
        self.failed = 0

    def __call__(self, part: str, what: str, **values: Any) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"part": part, "what": what, **values}) + "\n")
        said = " ".join(f"{k}={v}" for k, v in values.items())
        print(f"{time.monotonic() - STARTED:5.1f} {part:9} {what:40} {said}", flush=True)

    @contextmanager
    def attempt(self, part: str, what: str, **labels: str) -> Iterator[None]:
        """What is tried inside is lost where it raises, and nothing else.

        Raises:
            OutOfTimeError: no time is left for it.
        """
        if time.monotonic() - STARTED > self._budget:
            raise OutOfTimeError
        try:
            yield
        except OutOfTimeError:
            raise
        except Exception as error:
            self.failed += 1
            self(part, what, **labels, FAIL=f"{type(error).__name__}: {str(error)[:300]}")


def us(call: Call, rounds: int = 15) -> float:
    """Median microseconds of a call between events, with the host ahead of the device."""
    return round(1e6 * seconds(call, rounds), 2)


@contextmanager
def changed(module: ModuleType, **tiles: int) -> Iterator[None]:
    """Other tiles for the launches inside."""
    before = module.tiles_of
    module.tiles_of = lambda *a, **k: {**before(*a, **k), **tiles}
    try:
        yield
    finally:
        module.tiles_of = before


def overhead(log: Log) -> None:
    """What a launch costs a timing, with an empty queue and with the host ahead."""
    x = torch.ones(1 << 10, device="cuda")

    def one() -> None:
        x.add_(1.0)

    def twenty() -> None:
        for _ in range(20):
            x.add_(1.0)

    graph = as_graph(one)
    log("overhead", "graph of 1 kernel, host ahead", us=us(graph, 40))
    log("overhead", "graph of 20 kernels, host ahead", us=us(as_graph(twenty), 40))
    times = []
    for _ in range(40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    log("overhead", "graph of 1 kernel, queue empty", us=round(median(times), 2))


def host_us(call: Call, rounds: int = 300) -> float:
    """Microseconds of the host for a call that the device does faster."""
    for _ in range(20):
        call()
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(rounds):
            call()
        found.append((time.perf_counter() - begun) / rounds)
    torch.cuda.synchronize()
    return round(1e6 * min(found), 1)


def host(log: Log) -> None:
    x, w = (torch.randn(s, 64, device="cuda", dtype=torch.bfloat16) for s in (16, 64))
    one = Attention(AttentionCase((40, 40), 3, 2, 2, 8, 8, 64), torch.bfloat16, "cuda")
    targets = torch.zeros(16, dtype=torch.int64, device="cuda")
    calls: dict[str, Call] = {
        "F.linear": lambda: F.linear(x, w),
        "x + x": lambda: x + x,
        "shared_prefix_attention": lambda: one.ours("triton"),
        "label_nll": lambda: mk.label_nll(x, w, targets),
        "torch.tensor(list, device)": lambda: torch.tensor([1, 2, 3], device="cuda"),
        "replay of a graph of 12 kernels": as_graph(lambda: [x.add_(0.0) for _ in range(12)]),
    }
    for name, call in calls.items():
        with log.attempt("host", name):
            log("host", name, us=host_us(call))
    log("host", "attention with a new plan", us=host_us(one.ours_with_new_plan, 50))
    masters = [torch.randn(8, 64, device="cuda") for _ in range(96)]
    specs = [mk.TensorSpec(f"t{i}", (8, 64)) for i in range(96)]
    out = [[torch.empty_like(m, dtype=torch.bfloat16) for m in masters] for _ in range(2)]
    plan, pair = mk.AdapterPlan(masters, specs, out), [mk.Direction(0, 1)] * 2
    for backend in ("cuda", "triton"):
        if mk.backends()[backend] is None:

            def step(backend: str = backend) -> None:
                update = (pair[:1], [0.1])
                mk.perturb_into(
                    plan, directions=pair, scales=[1e-3, -1e-3], update=update, backend=backend
                )

            log("host", f"perturb_into {backend}", us=host_us(step, 100))


def attention(log: Log, device: str = "cuda") -> None:
    module = importlib.import_module("mezo_kernels.attention.triton")
    for name, case in ATTENTION.items():
        one = Attention(case, torch.bfloat16, device)
        first = None
        for variant, tiles in ATTENTION_TILES.items():
            with log.attempt("attention", name, variant=variant), changed(module, **tiles):
                if device == "cpu":
                    one.ours("triton")
                    continue
                call = as_graph(lambda one=one: one.ours("triton"))
                call()
                result = one.out.clone()
                first = result if first is None else first
                t = us(call)
                rate = round(case.nbytes / t * 1e-3)
                same = torch.equal(first, result)
                log("attention", name, variant=variant, us=t, gb_s=rate, same_bits=same)


def nll(log: Log, device: str = "cuda") -> None:
    module = importlib.import_module("mezo_kernels.nll.triton")
    for tokens, vocab, dim in NLL:
        # Nothing is read of tensors that are only compiled for.
        options = {"dtype": torch.bfloat16, "device": device}
        hidden, weight = torch.empty(tokens, dim, **options), torch.empty(vocab, dim, **options)
        if device != "cpu":
            hidden.normal_()
            weight.normal_(std=dim**-0.5)
        targets = torch.zeros(tokens, dtype=torch.int64, device=device)

        def run(hidden=hidden, weight=weight, targets=targets) -> torch.Tensor:
            return mk.label_nll(hidden, weight, targets, backend="triton")

        what = f"T {tokens} V {vocab} D {dim}"
        first = None
        if device != "cpu":
            linear = us(as_graph(lambda h=hidden, w=weight: F.linear(h, w)))
            log("nll", f"{what}: F.linear only", us=linear)
        for variant, tiles in NLL_TILES.items():
            with log.attempt("nll", what, variant=variant), changed(module, **tiles):
                if device == "cpu":
                    run()
                    continue
                result = run()
                call = as_graph(run)
                first = result if first is None else first
                t = us(call)
                rates = {
                    "gb_s": round(2 * vocab * dim / t * 1e-3),
                    "tflop_s": round(2e-6 * tokens * vocab * dim / t),
                }
                same = torch.equal(first, result)
                log("nll", what, variant=variant, us=t, **rates, same_bits=same)


def lanes(log: Log) -> None:
    """Which lane mapping copies fastest, in the byte patterns of perturb.cu."""
    call = Library(Path(__file__).parent / "lanes.cu").load().lanes
    call.argtypes = [ctypes.c_int] * 5 + [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_void_p]
    n = 1 << 27
    master = torch.randn(n, device="cuda")
    slots = [torch.empty(n, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    other = torch.empty_like(master)
    copy = us(lambda: other.copy_(master))
    log("lanes", "torch's copy, random data", us=copy, gb_s=round(8 * n / copy * 1e-3))
    stream = torch.cuda.current_stream().cuda_stream
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    addresses = [t.data_ptr() for t in (master, *slots)]
    for what, (name, nbytes) in enumerate({"pair": 8, "update": 8, "step": 12}.items()):
        for wide, hint, vectors, grid in (
            *(
                (wide, hint, v, 0)
                for wide in (1, 0)
                for hint, v in ((0, 1), (0, 2), (1, 2), (0, 4))
            ),
            *((wide, 0, 2, 8 * sms) for wide in (1, 0)),
        ):

            def run(given=(what, wide, hint, vectors, grid)) -> None:
                status = call(*given, *addresses, n, stream)
                if status:
                    raise RuntimeError(f"CUDA error {status}")

            variant = f"{'32 B a lane' if wide else '16 B contiguous'}, {vectors} vectors"
            variant += ", no L1" if hint else ""
            variant += ", persistent" if grid else ""
            with log.attempt("lanes", name, variant=variant):
                t = us(run, 9)
                log("lanes", name, variant=variant, us=t, gb_s=round(nbytes * n / t * 1e-3))


PARTS: dict[str, Callable[..., None]] = {
    "overhead": overhead,
    "host": host,
    "lanes": lanes,
    "attention": attention,
    "nll": nll,
}


def compile_only(parts: list[str]) -> int:
    """Compile the Triton variants for sm_90, and say what they need; returns how many failed."""
    from tests.support.dry_launch import dry_launches

    log = Log(None)
    with dry_launches(90) as launches:
        for name in parts:
            PARTS[name](log, "cpu")
    for text in sorted({str(launch) for launch in launches}):
        print(text)
    return log.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if options.compile:
        return int(compile_only(parts) > 0)
    log = Log(options.out, options.budget)
    for name in parts:
        try:
            with log.attempt(name, "the rest"):
                PARTS[name](log)
        except OutOfTimeError:
            log(name, "left out for want of time, from here on")
        torch.cuda.empty_cache()
    return int(log.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
