"""The timer: candidates run in turn in one process, and each round gives one ratio of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch

Call = Callable[[], object]


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

    @property
    def ratio_p25_p75(self) -> tuple[float, float]:
        quarters = quantiles(self.ratios, n=4)
        return quarters[0], quarters[2]


class Stopwatch(Protocol):
    """Measures calls one after the other."""

    def time(self, call: Call) -> None:
        """Run the call and keep its time."""

    def finish_round(self) -> list[float]:
        """Seconds of the calls since the last one of these."""


class HostClock:
    """Seconds of a clock of the host.

    The default is CPU time of the calling thread, so that neighbours on a shared machine do not
    count; calls must then run on that thread only.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._seconds: list[float] = []

    def time(self, call: Call) -> None:
        start = self._clock()
        call()
        self._seconds.append(self._clock() - start)

    def finish_round(self) -> list[float]:
        found, self._seconds = self._seconds, []
        return found


# Clock cycles that the device sleeps ahead of a call: about 80 us at 1.9 GHz. A launch takes the
# host 6 to 12 us, and the reader of the L2 cache is one launch.
HEAD_START_CYCLES = 150_000


class CudaEvents:
    """Seconds between events on the current CUDA stream.

    The device sleeps ahead of each call, so that the host has launched it when the first event
    fires: with an empty queue, a time would include the host's launch. Calls of many launches
    still have gaps where the host is slower than the device; `as_graph` calls leave those out.
    ``before`` runs ahead of each call and is not timed: `l2_reader` makes caches cold where one set
    of buffers has to do.
    """

    def __init__(self, before: Call | None = None) -> None:
        self._before = before
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Call) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        if self._before is not None:
            self._before()
        start.record()
        call()
        end.record()
        self._pairs.append((start, end))

    def finish_round(self) -> list[float]:
        # The queue stays short, and the host's work is not part of a time.
        torch.cuda.synchronize()
        found, self._pairs = self._pairs, []
        return [start.elapsed_time(end) * 1e-3 for start, end in found]


def interleave(
    calls: Mapping[str, Call | Sequence[Call]],
    rounds: int = 30,
    *,
    warm_up: int = 3,
    stopwatch: Stopwatch | None = None,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Time each candidate once per round, in turn.

    Args:
        calls: the candidates by name; the first one is the baseline of the ratios. A candidate may
            be a list of the same call on other buffers. A round uses the next one, so that what it
            reads was written to memory, not to the cache, as long as the buffers of a whole list
            are larger than that (`num_sets`).
        rounds: how often each candidate is timed.
        warm_up: how often each call runs before.
        stopwatch: CPU time of this thread if None.
        seconds: after which no round begins, but for the first two.

    Returns:
        {name: timing}, in the order of ``calls``.
    """
    variants = {name: own if isinstance(own, Sequence) else [own] for name, own in calls.items()}
    stopwatch = stopwatch or HostClock()
    for own in variants.values():
        for _ in range(warm_up):
            for call in own:
                call()
    if isinstance(stopwatch, CudaEvents):
        torch.cuda.synchronize()
    table = []
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= 2 and time.perf_counter() - started > seconds:
            break
        for own in variants.values():
            stopwatch.time(own[turn % len(own)])
        table.append(stopwatch.finish_round())
    columns = [list(column) for column in zip(*table, strict=True)]
    timings = {name: Timing(name, own, []) for name, own in zip(variants, columns, strict=True)}
    return rebased(timings, next(iter(timings)))


def rebased(timings: dict[str, Timing], baseline: str) -> dict[str, Timing]:
    """The same times with the ratios of another baseline."""
    base = timings[baseline].seconds
    return {
        name: Timing(name, t.seconds, [b / own for b, own in zip(base, t.seconds, strict=True)])
        for name, t in timings.items()
    }


def as_graph(call: Call) -> Call:
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


def l2_reader(l2_bytes: int) -> Call:
    """A call that reads twice the L2 cache; reading leaves nothing that must be written back."""
    filler = torch.zeros(l2_bytes // 2, dtype=torch.float32, device="cuda")
    total = torch.empty((), dtype=torch.float32, device="cuda")
    return lambda: torch.sum(filler, dim=0, out=total)


def num_sets(nbytes: int, l2_bytes: int, limit: int = 48) -> int:
    """How many sets of buffers of ``nbytes`` it takes to exceed twice the L2 cache."""
    return min(limit, max(1, -(-2 * l2_bytes // max(1, nbytes)) + 1))
