"""What the GPU benchmarks of named cases share: their options, their budget and their files."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch


class Named(Protocol):
    """A case."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def measure_all(
    cases: Iterable[C], measure: Callable[[C], list[str]], *, budget_s: float, only: str
) -> list[str]:
    """Measure the cases whose names have ``only`` in them; returns what was said of them.

    A case that raises, or that the budget leaves no time for, is a note that begins with FAIL.
    """
    started = time.monotonic()
    notes = []
    for case in cases:
        if only not in case.name:
            continue
        if time.monotonic() - started > budget_s:
            notes.append(f"FAIL {case.name}: left out, {budget_s:.0f} s were over")
            continue
        try:
            notes += measure(case)
        except Exception as error:
            traceback.print_exc()
            notes.append(f"FAIL {case.name}: {type(error).__name__}: {error}")
        torch.cuda.empty_cache()
        print(f"{time.monotonic() - started:.0f} s: {case.name}", file=sys.stderr, flush=True)
    return notes


def write(out: Path, name: str, text: str, facts: dict[str, Any]) -> int:
    """Write NAME.{md,json} and print the text; the exit status is 1 where a case failed.

    Args:
        out: folder, made where it is missing.
        name: of both files.
        text: the report.
        facts: what the JSON holds, "rows" and "notes" among them.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(text)
    return int(not facts["rows"] or any(note.startswith("FAIL") for note in facts["notes"]))


def main(
    name: str,
    description: str | None,
    cases: Callable[[], list[C]],
    plan_of: Callable[[list[C]], str],
    run: Callable[[Path, int, float, str], int],
    *,
    rounds: int,
) -> int:
    """Read the command line of ``bench.NAME`` and call ``run(out, rounds, budget_s, only)``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="where to write; bench/results/<device> otherwise")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which to stop")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--dry-run", action="store_true", help="print the cases, measure nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        print(plan_of([case for case in cases() if arguments.only in case.name]))
        return 0
    if not torch.cuda.is_available():
        print(f"bench.{name}: needs a CUDA device, found none; pass --dry-run.")
        return 2
    device = torch.cuda.get_device_name(0).lower().replace(" ", "-")
    out = arguments.out or Path(__file__).parent / "results" / device
    return run(out, arguments.rounds, arguments.budget, arguments.only)
