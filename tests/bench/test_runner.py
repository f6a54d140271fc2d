"""The runner and the timer on candidates that are known: FAIL, interleaving, ratios, budget."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median

import pytest
import torch

from bench import runner
from bench.runner import Bench, Candidate, Question
from bench.timing import HostClock, Timing, interleave, num_sets, rebased


@dataclass(frozen=True)
class Case:
    name: str


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def clock_of(steps):
    """A clock that moves on by the next of ``steps`` at every second reading."""
    left, now, is_start = list(steps), 0.0, False

    def clock():
        nonlocal now, is_start
        is_start = not is_start
        if not is_start:
            now += left.pop(0)
        return now

    return clock


def nothing():
    return None


def question_of(measure, **changes):
    def report(facts):
        columns = {"case": lambda r: r["case"], "path": lambda r: r["path"], "ratio": ratio}
        return (
            f"# x\n\n{runner.table(facts['rows'], columns)}\n\n{runner.notes_list(facts['notes'])}"
        )

    def ratio(row):
        return f"{row['ratio']:.2f}"

    cases = [Case(name) for name in ("a r8", "b r8", "c r16")]
    options = {"name": "x", "description": "x", "cases": lambda options: cases, "report": report}
    return Question(**(options | changes), measure=measure)


def measure_right_and_wrong(case, bench):
    candidates = [
        Candidate("base", lambda: nothing),
        Candidate("right", lambda: nothing, lambda call: None),
        Candidate("wrong", lambda: nothing, lambda call: "off by 3"),
    ]
    calls = bench.usable({"case": case.name}, candidates)
    for timing in interleave(calls, bench.rounds).values():
        row = {"case": case.name, "path": timing.name, **runner.microseconds(timing)}
        bench.rows.append(row)


def test_a_wrong_output_prints_fail_and_no_time(tmp_path, capsys):
    arguments = ["--device", "cpu", "--rounds", "2", "--only", "a", "--out", str(tmp_path / "new")]
    assert runner.main(question_of(measure_right_and_wrong), arguments) == 1
    printed = capsys.readouterr().out
    assert "| a r8 | wrong | FAIL |" in printed
    assert "* FAIL a r8: wrong: off by 3" in printed
    assert (tmp_path / "new" / "x.md").read_text() + "\n" == printed
    facts = json.loads((tmp_path / "new" / "x.json").read_text())
    (wrong,) = (row for row in facts["rows"] if row["path"] == "wrong")
    assert wrong == {"case": "a r8", "path": "wrong", "fail": "off by 3"}
    assert {"commit", "torch", "cpu", "threads"} <= set(facts)
    assert facts["threads"] == 1


def test_a_missing_number_is_an_error_where_nothing_failed():
    with pytest.raises(KeyError, match="ratio"):
        runner.table([{"case": "a"}], {"ratio": lambda r: r["ratio"]})


def test_candidates_take_turns_and_a_ratio_is_the_median_of_its_rounds():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("base", "ours")}
    # Round by round: base, ours. The host is slow in the second round, for both.
    clock = HostClock(clock_of([4, 2, 40, 10, 3, 3]))
    timings = interleave(calls, 3, warm_up=2, stopwatch=clock)
    assert order == ["base"] * 2 + ["ours"] * 2 + ["base", "ours"] * 3
    assert timings["ours"].seconds == [2, 10, 3]
    assert timings["ours"].ratios == [2, 4, 1]
    assert timings["ours"].ratio == 2
    assert timings["ours"].ratio != median([4, 40, 3]) / median([2, 10, 3])
    assert timings["base"].ratios == [1, 1, 1]
    assert rebased(timings, "ours")["base"].ratios == [0.5, 0.25, 1]


def test_no_round_begins_after_its_time_but_the_first_two():
    timings = interleave({"a": lambda: None}, 9, warm_up=0, seconds=-1.0)
    assert len(timings["a"].seconds) == 2
    assert len(interleave({"a": lambda: None}, 9, seconds=60.0)["a"].seconds) == 9


def test_a_candidate_of_several_buffers_uses_the_next_one_each_round():
    used = []
    variants = [lambda i=i: used.append(i) for i in range(3)]
    interleave({"ours": variants}, 5, warm_up=1)
    assert used == [0, 1, 2, 0, 1, 2, 0, 1]
    assert num_sets(10, 100) == 21
    assert num_sets(1, 1000) == 48
    assert num_sets(10**9, 100) == 2


def test_quantiles_of_a_timing():
    timing = Timing("x", [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert timing.p50 == 2.5
    assert timing.p20_p80 == (1.0, 4.0)
    assert timing.ratio_p25_p75 == (1.0, 3.0)


def bench_of():
    options = runner.parser_of(question_of(measure_right_and_wrong)).parse_args(["--device", "cpu"])
    return Bench(options, {})


def broken():
    raise ImportError("No module named 'elsewhere'\nand more of it")


def test_what_cannot_run_is_left_out_and_ours_is_an_error():
    bench, tried = bench_of(), []

    def absent():
        tried.append(1)
        return broken()

    for _ in range(2):
        calls = bench.usable({"case": "a"}, [Candidate("theirs", absent)])
        assert calls == {}
    assert len(tried) == 1
    assert bench.notes == ["theirs: left out. ImportError: No module named 'elsewhere'"]
    with pytest.raises(ImportError):
        bench.usable({"case": "a"}, [Candidate("ours", broken, is_ours=True)])
    # What ran before may fail for one case, and is tried in the next.
    is_full = False

    def sometimes():
        if is_full:
            raise MemoryError("full")
        return nothing

    for is_full in (False, True, False):
        calls = bench.usable({"case": "a"}, [Candidate("theirs too", sometimes)])
        assert list(calls) == ([] if is_full else ["theirs too"])
    assert bench.notes[1:] == ["theirs too: left out. MemoryError: full"]


def measure_some(case, bench):
    if case.name == "b r8":
        raise RuntimeError("out of memory")
    bench.rows.append({"case": case.name, "path": "-", "ratio": 1.0})


def test_a_case_that_fails_or_has_no_time_is_named(capsys):
    quiet = ["--device", "cpu", "--no-write"]
    assert runner.main(question_of(measure_some), [*quiet, "--only", "r8"]) == 1
    printed = capsys.readouterr()
    assert "* FAIL b r8: RuntimeError: out of memory" in printed.out
    assert "c r16" not in printed.out
    assert "Traceback" in printed.err
    assert runner.main(question_of(measure_some), [*quiet, "--only", "c"]) == 0
    assert runner.main(question_of(measure_some), [*quiet, "--budget", "-1"]) == 1
    left_out = "left out for want of time: 3 of 3 cases: a r8; b r8; c r16."
    assert f"* FAIL: {left_out}" in capsys.readouterr().out
    optional = question_of(measure_some, needs_all_cases=False)
    assert runner.main(optional, [*quiet, "--budget", "-1"]) == 1  # no row at all
    assert f"* L{left_out[1:]}" in capsys.readouterr().out


def test_a_question_may_stop_before_its_other_cases(capsys):
    def measure(case, bench):
        raise runner.StopRunError("the engine's errors are above the gate")

    assert runner.main(question_of(measure), ["--device", "cpu", "--no-write"]) == 1
    printed = capsys.readouterr().out
    assert "* FAIL a r8: the engine's errors are above the gate" in printed
    assert "b r8" not in printed


def test_a_dry_run_lists_the_cases_and_a_missing_device_is_said(capsys):
    def measure(case, bench):
        raise AssertionError

    assert runner.main(question_of(measure), ["--dry-run", "--only", "r8"]) == 0
    assert capsys.readouterr().out == "a r8\nb r8\n"
    if not torch.cuda.is_available():
        assert runner.main(question_of(measure), ["--device", "cuda"]) == 2
        assert "bench.x: needs a CUDA device" in capsys.readouterr().out
