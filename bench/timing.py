"""The interleaved timer: baseline and candidates take turns in one run, ratios per round.

Seconds are CPU time of the calling thread unless another clock is given, so that neighbours on a
shared machine do not count; calls must then run on that thread alone.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median, quantiles

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, and the baseline's time over its own, round by round."""

    name: str
    seconds: list[float]
    ratios: list[float]

    @property
    def p50(self) -> float:
        return median(self.seconds)

    @property
    def p20_p80(self) -> tuple[float, float]:
        fifths = quantiles(self.seconds, n=5)
        return fifths[0], fifths[3]

    @property
    def ratio(self) -> float:
        return median(self.ratios)


def interleave(
    calls: dict[str, Callable[[], object]],
    rounds: int = 30,
    *,
    warm_up: int = 3,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, Timing]:
    """Time each call once a round, in turn; the first one is the baseline of the ratios."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    baseline = next(iter(seconds.values()))
    return {
        name: Timing(name, own, [b / o for b, o in zip(baseline, own, strict=True)])
        for name, own in seconds.items()
    }


def rebased(timings: dict[str, Timing], baseline: str) -> dict[str, Timing]:
    """The same times with the ratios of another baseline."""
    base = timings[baseline].seconds
    return {
        name: Timing(name, t.seconds, [b / own for b, own in zip(base, t.seconds, strict=True)])
        for name, t in timings.items()
    }


def environment() -> dict[str, object]:
    """What a number depends on: date, commit, versions, CPU."""
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", "csrc", "mezo_kernels", "mezo", "bench/*.py"):
        commit += "-dirty"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_field("model name") or platform.processor(),
        "cpu_flags": sorted(
            flag
            for flag in cpu_field("flags").split()
            if flag.startswith(("avx", "fma", "f16c", "amx"))
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def cpu_field(name: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return ""


def interleave_on_gpu(
    calls: dict[str, list[Callable[[], object]]],
    rounds: int = 30,
    *,
    warm_up: int = 3,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time calls on the current CUDA stream, in turn; the first one is the baseline of the ratios.

    Each candidate is a list of the same call on other buffers; a round takes the next one, so that
    what it reads was written to memory, not to the L2 cache, as long as the buffers of a whole list
    are larger than that (`num_sets`). Times are between events, so they include the gaps of calls
    that launch more slowly than the device runs; pass `as_graph` calls to leave those out.
    ``before`` runs ahead of each call and is not timed: `l2_reader` makes caches cold where one set
    of buffers has to do.
    """
    for variants in calls.values():
        for _ in range(warm_up):
            for call in variants:
                call()
    torch.cuda.synchronize()
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for turn in range(rounds):
        for name, variants in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if before is not None:
                before()
            start.record()
            variants[turn % len(variants)]()
            end.record()
            pairs[name].append((start, end))
        # The queue stays short, and the host's work is not part of a time.
        torch.cuda.synchronize()
    seconds = {
        name: [start.elapsed_time(end) * 1e-3 for start, end in own] for name, own in pairs.items()
    }
    baseline = next(iter(seconds.values()))
    return {
        name: Timing(name, own, [b / o for b, o in zip(baseline, own, strict=True)])
        for name, own in seconds.items()
    }


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: what it costs once launching costs next to nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def l2_reader(l2_bytes: int) -> Callable[[], object]:
    """A call that reads twice the L2 cache; reading leaves nothing that must be written back."""
    filler = torch.zeros(l2_bytes // 2, dtype=torch.float32, device="cuda")
    total = torch.empty((), dtype=torch.float32, device="cuda")
    return lambda: torch.sum(filler, dim=0, out=total)


def num_sets(nbytes: int, l2_bytes: int, limit: int = 48) -> int:
    """How many sets of buffers of ``nbytes`` it takes to exceed twice the L2 cache."""
    return min(limit, max(1, -(-2 * l2_bytes // max(1, nbytes)) + 1))


def gpu_environment() -> dict[str, object]:
    """What a number on a GPU depends on."""
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        smi = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        smi = ""
    host = environment()
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        query: smi,
        **{key: host[key] for key in ("date", "commit", "python", "torch")},
    }
