"""Replay of a run from its seed and coefficients, against the same replay by torch.randn.

`python -m bench.replay` measures this CPU, one thread, each of our code paths, on the tensors of
the demo's adapter, and writes bench/results/cpu/replay.*.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench import runner
from bench.directions import on_isa, vector_isas
from bench.environment import facts_line
from bench.runner import Bench, Candidate, Facts, Question, Row
from bench.shapes import lora_specs
from bench.timing import Call, Timing, interleave
from mezo.checkpoint.replay import replay
from mezo_kernels import TensorSpec

MODEL, RANK = "smollm2-135m", 8
RUN_STEPS = 20_000
# Of one case; the torch loop of a round of many steps takes a good part of it.
SECONDS_PER_CASE = 60.0
METHOD = (
    f"theta of a LoRA of rank {RANK} on all linears of {MODEL}. The torch loop seeds its generator "
    "per step, then draws `torch.randn` for each tensor and adds it in place. Ratio: its time over "
    "ours, median of per-round ratios, interleaved in one process on one thread, in CPU time of "
    f"that thread. The run of {RUN_STEPS} steps was replayed once, theta_0 and tables included. "
    "Written by `python -m bench.replay`."
)


@dataclass(frozen=True)
class Case:
    """A replay of so many steps of one direction."""

    steps: int

    @property
    def name(self) -> str:
        return f"{self.steps} steps"


@functools.cache
def specs() -> list[TensorSpec]:
    return lora_specs(MODEL, RANK)


def num_elements() -> int:
    return sum(spec.shape[0] * spec.shape[1] for spec in specs())


def coefficients_of(steps: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1e-4, (steps, 1)).astype(np.float32)


def ours(
    tensors: Sequence[TensorSpec], steps: int, *, from_zeros: bool = True, backend: str = "cpu"
) -> Callable[[], list[torch.Tensor]]:
    """Our replay; ``from_zeros`` leaves theta_0 out of it."""
    start = [torch.zeros(spec.shape) for spec in tensors] if from_zeros else None
    coefficients = coefficients_of(steps)
    return lambda: replay(
        tensors,
        seed=0,
        distribution="gaussian",
        num_directions=1,
        coefficients=coefficients,
        start=start,
        backend=backend,
    )


def by_torch(steps: int) -> Call:
    """The same work by torch's generator, as a replay of MeZO's loop does it."""
    tensors = [torch.zeros(spec.shape) for spec in specs()]
    generator = torch.Generator()
    coefficients = coefficients_of(steps)[:, 0].tolist()

    def run() -> None:
        for step, coefficient in enumerate(coefficients):
            generator.manual_seed(step)
            for tensor in tensors:
                z = torch.randn(tensor.shape, generator=generator)
                tensor.add_(z, alpha=coefficient)

    return run


def complaint() -> str | None:
    """Compare the code path in use with the reference, in the first layer."""
    first = specs()[:14]
    found, expected = ours(first, 3)(), ours(first, 3, backend="reference")()
    same = all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(found, expected, strict=True)
    )
    return None if same else "differs from the bits of the reference"


def candidates(case: Case) -> list[Candidate]:
    """The torch loop, then our code paths."""
    call = ours(specs(), case.steps)
    return [
        Candidate("torch.randn", lambda: by_torch(case.steps)),
        *(
            Candidate(
                isa,
                lambda isa=isa: on_isa(isa, call),
                lambda _, isa=isa: on_isa(isa, complaint)(),
                is_ours=True,
            )
            for isa in vector_isas()
        ),
    ]


def measure(case: Case, bench: Bench) -> None:
    if case.steps == bench.options.run_steps:
        whole = ours(specs(), case.steps, from_zeros=False)
        began, began_cpu = time.perf_counter(), time.thread_time()
        whole()
        bench.facts["run"] = {
            "steps": case.steps,
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.thread_time() - began_cpu, 1),
        }
        return
    calls = bench.usable({"case": case.name}, candidates(case))
    timings = interleave(calls, bench.rounds, warm_up=1, seconds=SECONDS_PER_CASE)
    bench.rows += [row_of(case, timing) for timing in timings.values()]


def row_of(case: Case, timing: Timing) -> Row:
    nanoseconds = 1e9 / (case.steps * num_elements())
    low, high = timing.p20_p80
    return {
        "case": case.name,
        "path": timing.name,
        "ratio": round(timing.ratio, 2),
        "ns_per_normal": round(timing.p50 * nanoseconds, 3),
        "p20": round(low * nanoseconds, 3),
        "p80": round(high * nanoseconds, 3),
        "best": round(min(timing.seconds) * nanoseconds, 3),
        "rounds": len(timing.seconds),
    }


COLUMNS: dict[str, Callable[[Row], object]] = {
    "steps": lambda r: r["case"],
    "path": lambda r: r["path"],
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "ns per normal": lambda r: f"{r['ns_per_normal']:.2f}",
    "p20 - p80": lambda r: f"{r['p20']:.2f} - {r['p80']:.2f}",
    "best": lambda r: f"{r['best']:.2f}",
    "rounds": lambda r: r["rounds"],
}


def report(facts: Facts) -> str:
    rows = runner.table(facts["rows"], COLUMNS)
    found = facts.get("run")
    whole = f"{run_text(found)}\n\n" if found else ""
    return (
        f"# Replay on the CPU\n\n{METHOD}\n\n{rows}\n\n{whole}"
        f"{runner.notes_list(facts.get('notes', ()))}{facts_line(facts)}\n"
    )


def run_text(found: dict[str, float]) -> str:
    return (
        f"A run of {found['steps']:,} steps took {found['seconds']:.0f} s on the clock, "
        f"{found['cpu_seconds']:.0f} s of CPU time."
    )


def cases(options: argparse.Namespace) -> list[Case]:
    return [Case(100), Case(1000), Case(options.run_steps)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-steps", type=int, default=RUN_STEPS, help="of the run that is replayed once"
    )


def begin(bench: Bench) -> None:
    bench.facts["elements"], bench.facts["tensors"] = num_elements(), len(specs())


QUESTION = Question(
    name="replay",
    description=__doc__,
    cases=cases,
    measure=measure,
    report=report,
    add_options=add_options,
    begin=begin,
    rounds=9,
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
