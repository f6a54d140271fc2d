"""The runner of all questions: cases x candidates on a device give NAME.json and a table.

A question is a module of bench/ that makes a `Question` and passes it to `main`. The JSON holds
what the numbers depend on. The table is made of the JSON only, so `make tables` can write it anew.
Each row is appended to NAME.jsonl as soon as its case is measured; that file stays only where the
run does not reach its end. On a GPU cases run in a process of their own, see `bench.worker`.
"""

from __future__ import annotations

import argparse
import copy
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
from bench.worker import OPTION, Channel, Workers, is_sticky, module_of

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

    def __init__(self, options: Options, facts: Facts, rows_path: Path | None = None) -> None:
        self.options = options
        self.device: str = options.device
        self.rounds: int = options.rounds
        self.facts = facts
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._rows_path = rows_path
        self._num_kept = 0
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

    def keep(self) -> None:
        """Append the rows that are new to the file of rows."""
        new, self._num_kept = self.rows[self._num_kept :], len(self.rows)
        if self._rows_path is None or not new:
            return
        self._rows_path.parent.mkdir(parents=True, exist_ok=True)
        with self._rows_path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)

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
        isolate: default of --isolate on a GPU.
        case_limit_s: default of --case-limit.
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
    isolate: str = "crash"
    case_limit_s: float = 60.0


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
    if options.worker:
        serve(question, cases, options)
        return 0
    folder = options.out or RESULTS / folder_name(options.device)
    rows_path = None if options.no_write else folder / f"{options.name}.jsonl"
    bench = Bench(options, {}, rows_path)
    isolate = options.isolate or (question.isolate if options.device == "cuda" else "none")
    if isolate == "none":
        prepare(question, bench)
        measure_all(question, cases, bench, lambda case: measure_here(question, case, bench))
    else:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        with Workers(module_of(question.measure), arguments, is_fresh=isolate == "case") as workers:
            workers.start()  # imports and preparation are not of the budget
            measure_all(
                question, cases, bench, lambda case: measure_elsewhere(workers, case, bench)
            )
    facts = {**bench.facts, "notes": list(dict.fromkeys(bench.notes)), "rows": bench.rows}
    text = question.report(facts) if bench.facts else "\n".join(facts["notes"])
    print(text)
    # A run that measured nothing leaves older results in place.
    if bench.rows and rows_path is not None:
        write(folder, options.name, text, facts)
        rows_path.unlink(missing_ok=True)
    return int(not bench.rows or any(note.startswith("FAIL") for note in bench.notes))


def prepare(question: Question, bench: Bench) -> None:
    """What comes before the first case in a process that measures."""
    torch.manual_seed(0)
    if bench.device == "cpu":
        torch.set_num_threads(1)
    bench.facts |= environment(bench.device)
    question.begin(bench)


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
    parser.add_argument(
        "--isolate",
        choices=("none", "crash", "case"),
        help="cases in this process, in another one until it crashes, or each in one of its own",
    )
    parser.add_argument(
        "--case-limit",
        type=float,
        default=question.case_limit_s,
        help="seconds after which a case in a process of its own is ended",
    )
    parser.add_argument(OPTION, action="store_true", help=argparse.SUPPRESS)
    question.add_options(parser)
    return parser


def measure_all(
    question: Question,
    cases: Sequence[Case],
    bench: Bench,
    measure: Callable[[Case], object],
) -> None:
    """Measure the cases while the budget lasts.

    Args:
        question: that has them.
        cases: in order.
        bench: gets rows, and a note that begins with FAIL for a case that raises.
        measure: measures a case.
    """
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
            measure(case)
        except StopRunError as stop:
            bench.notes.append(f"FAIL {case.name}: {stop}")
            break
        bench.keep()
        longest = max(longest, time.monotonic() - begun)
        print(f"{time.monotonic() - started:.0f} s: {case.name}", file=sys.stderr, flush=True)
    if left_out:
        word = "FAIL: left out" if question.needs_all_cases else "Left out"
        bench.notes.append(
            f"{word} for want of time: {len(left_out)} of {len(cases)} cases: "
            f"{'; '.join(left_out[:12])}{' ...' if len(left_out) > 12 else ''}."
        )


def measure_here(question: Question, case: Case, bench: Bench) -> Exception | None:
    """Measure a case in this process; what it raises is a note that begins with FAIL."""
    raised = None
    try:
        question.measure(case, bench)
    except StopRunError:
        raise
    except Exception as error:
        traceback.print_exc()
        bench.notes.append(f"FAIL {case.name}: {line_of(error)}")
        raised = error
    # Graphs and copies of a case are gone before the next one.
    gc.collect()
    if bench.device == "cuda" and raised is None:
        torch.cuda.empty_cache()
    return raised


def measure_elsewhere(workers: Workers, case: Case, bench: Bench) -> None:
    """Measure a case in a worker.

    Raises:
        StopRunError: the case has raised one, or no worker can be prepared.
    """
    message = workers.measure(case.name, bench.options.case_limit)
    if message.get("never_ready"):
        raise StopRunError(f"no worker is ready to measure: {message['lost']}")
    if "lost" in message:
        bench.notes.append(f"FAIL {case.name}: {message['lost']}")
        return
    bench.rows += message["rows"]
    bench.notes += message["notes"]
    for key, value in message["prepared"].items():
        bench.facts.setdefault(key, value)
    for key, value in message["found"].items():
        is_list = isinstance(value, list)
        bench.facts[key] = [*bench.facts.get(key, ()), *value] if is_list else value
    if message["stop"]:
        raise StopRunError(message["stop"])


def serve(question: Question, cases: Sequence[Case], options: Options) -> None:
    """Measure the cases whose names the parent sends."""
    channel = Channel()
    by_name = {case.name: case for case in cases}
    first = Bench(options, {})
    prepare(question, first)
    prepared = copy.deepcopy(first.facts)
    channel.send()  # ready
    for name in channel.names():
        bench = Bench(options, copy.deepcopy(prepared))
        bench.notes, first.notes = first.notes, []
        stop, raised = "", None
        try:
            raised = measure_here(question, by_name[name], bench)
        except StopRunError as error:
            stop = str(error)
        channel.send(
            rows=bench.rows,
            notes=bench.notes,
            prepared=prepared,
            found={k: v for k, v in bench.facts.items() if v != prepared.get(k)},
            stop=stop,
            is_broken=raised is not None and is_sticky(raised),
        )


def write(folder: Path, name: str, text: str, facts: Facts) -> None:
    """Write NAME.md and NAME.json into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (folder / f"{name}.md", text),
        (folder / f"{name}.json", json.dumps(facts, indent=1) + "\n"),
    ):
        # Whole, or not at all: a run may be ended at any moment.
        part = path.with_name(f".{path.name}.part")
        part.write_text(content)
        part.replace(path)


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
