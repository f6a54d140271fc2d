"""Cases in processes of their own: a crash, a hang or a broken GPU costs one case and no rows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from bench import runner
from tests.support.flaky_question import QUESTION
from tests.support.source import ROOT


def run(tmp_path, *arguments):
    arguments = ["--device", "cpu", "--out", str(tmp_path), *arguments]
    status = runner.main(QUESTION, arguments)
    return status, json.loads((tmp_path / "flaky.json").read_text())


def test_a_crash_costs_one_case(tmp_path, capsys):
    status, facts = run(tmp_path, "--isolate", "crash")
    assert status == 1
    assert [row["case"] for row in facts["rows"]] == ["good 1", "good 2", "good 3", "good 4"]
    assert facts["notes"] == [
        "begun",
        "FAIL dies: its process was ended by SIGQUIT",
        "FAIL hangs: took more than 3 s and was ended",
        "FAIL raises: ValueError: seen on the way",
        "FAIL sticky: RuntimeError: CUDA error: an illegal memory access was encountered",
    ]
    # Of cases that were lost, nothing is known; facts of one kind are those of all workers.
    assert facts["cases"] == ["good 1", "good 2", "raises", "sticky", "good 3", "good 4"]
    pids = [row["pid"] for row in facts["rows"]]
    assert pids[2] == pids[3]
    assert len({*pids}) == 3
    assert facts["cpu_flags"] == sorted(set(facts["cpu_flags"]))
    assert not (tmp_path / "flaky.jsonl").exists()
    assert str(facts["cases"]) in capsys.readouterr().out


def test_a_workers_start_is_not_of_the_budget(tmp_path):
    status, facts = run(tmp_path, "--isolate", "crash", "--names", "good 1", "--budget", "0.5")
    assert status == 0
    assert [row["case"] for row in facts["rows"]] == ["good 1"]


def test_a_worker_that_cannot_be_prepared_ends_the_run(tmp_path, capsys):
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--isolate", "crash"]
    assert runner.main(QUESTION, [*arguments, "--broken"]) == 1
    said = capsys.readouterr().out
    assert said.count("FAIL good 1: no worker is ready to measure: its process ended") == 1
    assert "dies" not in said


def test_each_case_in_a_process_of_its_own(tmp_path):
    _, facts = run(tmp_path, "--isolate", "case", "--names", "good 1,good 2")
    assert len({row["pid"] for row in facts["rows"]}) == 2
    assert facts["cases"] == ["good 1", "good 2"]


def test_a_worker_may_stop_the_run(tmp_path):
    _, facts = run(tmp_path, "--isolate", "crash", "--names", "good 1,stops,good 2")
    assert [row["case"] for row in facts["rows"]] == ["good 1"]
    assert facts["notes"][-1] == "FAIL stops: no further case is worth it"


@pytest.mark.parametrize("isolate", ["none", "crash"])
def test_rows_are_on_the_disk_when_the_run_is_killed(tmp_path, isolate):
    command = [sys.executable, "-m", QUESTION.measure.__module__, "--device", "cpu"]
    command += ["--out", str(tmp_path), "--isolate", isolate, "--names", "good 1,good 2,hangs"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "good 2" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    lines = (tmp_path / "flaky.jsonl").read_text().splitlines()
    assert [json.loads(line)["case"] for line in lines] == ["good 1", "good 2"]
