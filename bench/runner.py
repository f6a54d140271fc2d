"""The runner of all questions: cases x candidates on a device give NAME.json and a table.

A question is a module of bench/ that makes a `Question` and passes it to `main`. The JSON holds
what the numbers depend on. The table is made of the JSON only, so `make tables` can write it anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.environment import environment, folder_name
from bench.timing import Call, Timing

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
Facts = dict[str, Any]
Options = argparse.Namespace


class Case(Protocol):
    """What the candidates do, by a name of its own."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a case.

    Args:
        name: what the table calls it.
        make: returns the call, or the same call on several buffers.
        complaint: what is wrong with the output of the (first) call; None where nothing is.
        is_ours: whether an error is a failure; other people's code is then left out.
    """

    name: str
    make: Callable[[], Call | Sequence[Call]]
    complaint: Callable[[Call], str | None] | None = None
    is_ours: bool = False


class StopRunError(Exception):
    """No further case is worth its time; the message says why."""


class Bench:
    """One run of a question: its device, what it depends on, and the rows and notes so far."""

    def __init__(self, options: Options, facts: Facts) -> None:
        self.options = options
        self.device: str = options.device
        self.rounds: int = options.rounds
        self.facts = facts
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._ran: set[str] = set()
        self._left_out: set[str] = set()

    def usable(
        self, labels: Mapping[str, str], candidates: Iterable[Candidate]
    ) -> dict[str, Call | Sequence[Call]]:
        """The calls whose output is right, by name; the others are rows that say FAIL, or notes.

        A candidate that raises before it ever ran is not tried again: its package is missing.
        """
        calls: dict[str, Call | Sequence[Call]] = {}
        for candidate in candidates:
            name = candidate.name
            if name in self._left_out:
                continue
            try:
                made = candidate.make()
                first = made[0] if isinstance(made, Sequence) else made
                wrong = candidate.complaint(first) if candidate.complaint else None
            # Whatever other people's code raises: it is left out, and the rest is measured.
            except Exception as problem:
                if candidate.is_ours:
                    raise
                self.notes.append(f"{name}: left out. {line_of(problem)}")
                if name not in self._ran:
                    self._left_out.add(name)
                continue
            self._ran.add(name)
            if wrong is None:
                calls[name] = made
            else:
                self.fail(labels, name, wrong)
        return calls

    def fail(self, labels: Mapping[str, str], name: str, wrong: str) -> None:
        """Say that a candidate's output is wrong: a row without a time, and a note."""
        self.rows.append({**labels, "path": name, "fail": wrong})
        self.notes.append(f"FAIL {', '.join(labels.values())}: {name}: {wrong}")


@dataclass(frozen=True)
class Question:
    """What one module of bench/ measures.

    Args:
        name: of the files.
        description: for --help.
        cases: the cases for these options, the important ones first.
        measure: appends the rows of a case to `Bench.rows`.
        report: the text of NAME.md, from the content of NAME.json.
        plan: the text of --dry-run.
        add_options: further options.
        begin: runs once before the cases.
        rounds: default of --rounds.
        budget_s: default of --budget on a GPU.
        needs_all_cases: whether a case that the budget leaves out is a failure.
    """

    name: str
    description: str | None
    cases: Callable[[Options], Iterable[Any]]
    measure: Callable[[Any, Bench], None]
    report: Callable[[Facts], str]
    plan: Callable[[list[Any]], str] = lambda cases: "\n".join(case.name for case in cases)
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    begin: Callable[[Bench], None] = lambda bench: None
    rounds: int = 30
    budget_s: float = 300.0
    needs_all_cases: bool = True


def main(question: Question, arguments: Sequence[str] | None = None) -> int:
    """Run a question as the command line says.

    Returns:
        The exit status: 0, 1 where a case failed, 2 where the device is not there.
    """
    options = parser_of(question).parse_args(arguments)
    cases = [case for case in question.cases(options) if options.only in case.name]
    if options.dry_run:
        print(question.plan(cases))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"bench.{question.name}: needs a CUDA device, found none; pass --dry-run.")
        return 2
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(options, environment(options.device))
    question.begin(bench)
    measure_all(question, cases, bench)
    facts = {**bench.facts, "notes": list(dict.fromkeys(bench.notes)), "rows": bench.rows}
    text = question.report(facts)
    print(text)
    # A run that measured nothing leaves older results in place.
    if bench.rows and not options.no_write:
        write(options.out or RESULTS / folder_name(options.device), options.name, text, facts)
    return int(not bench.rows or any(note.startswith("FAIL") for note in bench.notes))


def parser_of(question: Question) -> argparse.ArgumentParser:
    """The options that every question has, and its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{question.name}", description=question.description
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=question.rounds)
    parser.add_argument("--out", type=Path, help="folder, default bench/results/<device>")
    parser.add_argument("--name", default=question.name, help="of the files")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--budget", type=float, help="seconds after which no case starts")
    parser.add_argument("--dry-run", action="store_true", help="list the cases, measure nothing")
    parser.add_argument("--no-write", action="store_true", help="print, write nothing")
    question.add_options(parser)
    return parser


def measure_all(question: Question, cases: Sequence[Case], bench: Bench) -> None:
    """Measure the cases while the budget lasts; one that raises is a note that begins with FAIL."""
    budget_s = bench.options.budget
    if budget_s is None:
        budget_s = question.budget_s if bench.device == "cuda" else float("inf")
    started = time.monotonic()
    longest = 0.0
    left_out = []
    for case in cases:
        begun = time.monotonic()
        if begun - started + longest > budget_s:
            left_out.append(case.name)
            continue
        try:
            question.measure(case, bench)
        except StopRunError as stop:
            bench.notes.append(f"FAIL {case.name}: {stop}")
            break
        except Exception as error:
            traceback.print_exc()
            bench.notes.append(f"FAIL {case.name}: {line_of(error)}")
        # Graphs and copies of a case are gone before the next one.
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - begun)
        print(f"{time.monotonic() - started:.0f} s: {case.name}", file=sys.stderr, flush=True)
    if left_out:
        word = "FAIL: left out" if question.needs_all_cases else "Left out"
        bench.notes.append(
            f"{word} for want of time: {len(left_out)} of {len(cases)} cases: "
            f"{'; '.join(left_out[:12])}{' ...' if len(left_out) > 12 else ''}."
        )


def write(folder: Path, name: str, text: str, facts: Facts) -> None:
    """Write NAME.md and NAME.json into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def table(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], object]]) -> str:
    """A Markdown table; FAIL stands where a candidate with a wrong output has no number."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = []
        for cell in columns.values():
            try:
                cells.append(str(cell(row)))
            except KeyError:
                if "fail" not in row:
                    raise
                cells.append("FAIL")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes_list(notes: Iterable[str]) -> str:
    """The notes as a Markdown list with an empty line behind it; nothing for none."""
    lines = [f"* {note}" for note in notes]
    return "\n".join([*lines, "", ""]) if lines else ""


def microseconds(timing: Timing, digits: int = 1) -> Row:
    """Median, p20 and p80 in us, and the ratio, as a row holds them."""
    low, high = timing.p20_p80
    return {
        "p50_us": round(timing.p50 * 1e6, digits),
        "p20_us": round(low * 1e6, digits),
        "p80_us": round(high * 1e6, digits),
        "ratio": round(timing.ratio, 2),
    }


def line_of(problem: Exception) -> str:
    """The type and the first line of an exception."""
    return f"{type(problem).__name__}: {next(iter(str(problem).splitlines()), '')[:200]}"
