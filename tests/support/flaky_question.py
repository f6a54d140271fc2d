"""A question whose cases crash, hang and raise; run as a module it serves as its own worker."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass

from bench import runner
from bench.runner import Bench, Question


@dataclass(frozen=True)
class Case:
    name: str


NAMES = ("good 1", "dies", "good 2", "hangs", "raises", "sticky", "good 3", "good 4")


def measure(case: Case, bench: Bench) -> None:
    bench.facts["cases"] = [*bench.facts["cases"], case.name]
    print("what a library prints is no message")
    if case.name == "dies":
        os.kill(os.getpid(), signal.SIGQUIT)
    if case.name == "hangs":
        time.sleep(1000)
    if case.name == "raises":
        raise ValueError("seen on the way")
    if case.name == "sticky":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if case.name == "stops":
        raise runner.StopRunError("no further case is worth it")
    bench.rows.append({"case": case.name, "pid": os.getpid()})


def begin(bench: Bench) -> None:
    if bench.options.broken:
        raise OSError("no compiler")
    bench.facts["cases"] = []
    bench.notes.append("begun")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("--broken", action="store_true")


QUESTION = Question(
    name="flaky",
    description=__doc__,
    cases=lambda options: [Case(name) for name in options.names.split(",")],
    measure=measure,
    report=lambda facts: f"{facts['cases']} {facts['commit']}",
    add_options=add_options,
    begin=begin,
    case_limit_s=3.0,
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
