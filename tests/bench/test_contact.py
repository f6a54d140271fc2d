"""The calls on a GPU box, with a stand-in for it: budgets, failures, an archive at any time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import stages
from bench.gpu.contact import CALLS, Host
from tests.support.source import ROOT

BOX = ROOT / "tests" / "support" / "gpu_box"


def is_running(child: Path) -> bool:
    """Whether the process that a file names runs, and is no zombie."""
    try:
        fields = Path(f"/proc/{child.read_text()}/stat").read_text()
    except OSError:
        return False
    return fields.rpartition(")")[2].split()[0] != "Z"


class Box:
    """A stand-in for a box: starts calls, and knows what ran and what came back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"

    def start(self, call: int, plan: dict, *arguments: str) -> subprocess.Popen:
        (self.folder / "plan.json").write_text(json.dumps(plan))
        return subprocess.Popen(
            ["bash", "bench/gpu/contact.sh", str(call), *arguments],
            cwd=ROOT,
            env={
                "PATH": f"{BOX}:{Path(sys.executable).parent}:/usr/bin:/bin",
                # The interpreter of contact.sh itself is a real one.
                "PYTHON": str(self.contact_python()),
                "GPU_BOX": str(self.folder),
                "OUT": str(self.out),
                "TMPDIR": str(self.folder),
            },
            stdout=subprocess.PIPE,
            text=True,
        )

    def contact_python(self) -> Path:
        """Runs bench.gpu.contact for real, and anything else by the stand-in."""
        path = self.folder / "python"
        path.write_text(
            f'#!/usr/bin/env bash\n[[ "$*" = *bench.gpu.contact* ]] && exec {sys.executable} "$@"\n'
            f'exec {sys.executable} {BOX / "python3"} "$@"\n'
        )
        path.chmod(0o755)
        return path

    def run(self, call: int, plan: dict, *arguments: str) -> tuple[int, str]:
        process = self.start(call, plan, *arguments)
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed

    def files(self, call: int) -> dict[str, str]:
        """What is in the archive."""
        with tarfile.open(self.out / f"call{call}.tgz") as tar:
            return {
                Path(member.name).name: tar.extractfile(member).read().decode()
                for member in tar.getmembers()
            }

    def stages(self, call: int) -> dict[str, dict]:
        lines = self.files(call).get("stages.jsonl", "").splitlines()
        return {row["name"]: row for row in map(json.loads, lines)}

    def left(self) -> list[int]:
        """Processes of this box's stages that are still there."""
        child = self.folder / "child"
        found = [int(child.read_text())] if child.exists() and is_running(child) else []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"GPU_BOX={self.folder}\0".encode() in path.read_bytes() + b"\0":
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


@pytest.fixture
def box(tmp_path):
    found = Box(tmp_path)
    yield found
    for pid in found.left():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_runs_its_stages_and_its_archive_has_them(box, call):
    status, printed = box.run(call, {})
    assert status == 0, printed
    outcomes = box.stages(call)
    planned = CALLS[call](Host("python", Path("x"), dry=False))
    assert set(outcomes) == {stage.name for stage in planned}
    assert {row["status"] for row in outcomes.values()} == {"0"}
    assert os.listdir(box.out) == [f"call{call}.tgz"]
    files = box.files(call)
    assert {f"{name}.log" for name in outcomes} <= set(files)
    assert "build ran" in files["build.log"]
    # Where no wheels were collected, a line behind the verdict says so.
    lines = [line for line in printed.splitlines() if line and not line.startswith("contact:")]
    assert files["verdict.txt"].strip().splitlines() == lines[len(planned) :]
    last = lines[-1]
    assert last == f"next: bash bench/gpu/contact.sh {call + 1}" if call < 3 else "stage" in last
    commands = (box.folder / "commands.jsonl").read_text().splitlines()
    assert len(commands) == len(planned)


def test_what_needs_a_failed_stage_is_skipped_and_the_rest_runs(box):
    plan = {"build": {"status": 1, "print": "error: no such file"}}
    status, printed = box.run(1, plan)
    outcomes = box.stages(1)
    assert status == 1
    assert outcomes["build"]["status"] == "1"
    assert outcomes["usable"]["status"] == "skipped: needs build"
    for name in ("tests", "probe", "directions"):
        assert outcomes[name]["status"] == "skipped: needs usable"
    for name in ("facts", "install", "smoke", "smoke-opt-1.3b"):
        assert outcomes[name]["status"] == "0", printed
    assert "error: no such file" in box.files(1)["build.log"]
    # Its reason is said, and no next call.
    assert "build: error: no such file" in printed.splitlines()
    assert "next:" not in printed


def test_a_stage_that_hangs_ends_at_the_limit_with_all_that_it_started(box):
    plan = {"memcheck": {"seconds": 1000, "is_deaf": True, "leaves": True, "print": "1 passed"}}
    started = time.monotonic()
    status, printed = box.run(2, plan, "--limit", "16")
    assert time.monotonic() - started < 25
    outcomes = box.stages(2)
    assert status == 1
    assert outcomes["memcheck"]["status"].startswith("ended after")
    assert outcomes["memcheck"]["at"] < 16.5
    # What followed had no time, and says so.
    assert outcomes["tests"]["status"] == "no time left"
    assert "memcheck: 1 passed" in printed
    assert box.left() == []


def test_one_that_succeeds_leaves_no_process_behind(box):
    _, printed = box.run(3, {"e2e-opt-1.3b": {"leaves": True}})
    assert "stage e2e-opt-1.3b: ok" in printed
    assert box.left() == []


# Rows that a stage writes at about these moments of a call of 9 stages.
ROWS = [{"part": "smoke", "what": f"reached {i}", "at": i} for i in range(30)]


@pytest.mark.parametrize("seed", range(4))
def test_the_archive_is_there_after_a_sigkill_at_any_moment(box, seed):
    after = random.Random(seed).uniform(0.3, 9.0)
    plan = {
        "facts": {"seconds": 0.5},
        "tests": {"seconds": 1.0},
        "smoke": {"seconds": 8.0, "rows": {"smoke.jsonl": ROWS}},
        "probe": {"seconds": 5.0},
    }
    process = box.start(1, plan)
    archive = box.out / "call1.tgz"
    deadline = time.monotonic() + 20
    while not archive.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(after)
    process.kill()
    killed = time.monotonic()
    printed, _ = process.communicate(timeout=20)
    assert time.monotonic() - killed < 20
    files = box.files(1)
    # Stages that were printed as over are in the archive: it was renewed behind each.
    over = [line.split(":")[0] for line in printed.splitlines() if " at " in line]
    known = {json.loads(line)["name"] for line in files.get("stages.jsonl", "").splitlines()}
    assert set(over[:-1]) <= known
    # Rows of a stage that was running are at most some seconds old.
    written = sum(1 for line in files.get("smoke.jsonl", "").splitlines() if line)
    lost = (stages.RENEW_SECONDS + 1.5) * len(ROWS) / 8.0
    assert written >= min(len(ROWS), (after - 1.0) * len(ROWS) / 8.0 - lost)
    assert len(os.listdir(box.out)) <= 2


def test_a_call_that_is_ended_prints_what_it_has(box):
    process = box.start(1, {"tests": {"seconds": 1000, "leaves": True}})
    while True:
        if "usable" in process.stdout.readline():
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert "stage usable: ok" in printed
    assert "stage directions: no time left" in printed
    assert box.left() == []
    assert "verdict.txt" in box.files(1)


def test_the_verdict_names_what_failed_and_the_next_call_leaves_it_out(box):
    failed = "FAILED tests/kernels/test_x.py::test_bits[cuda] - AssertionError\n3 failed, 5 passed"
    rows = [
        {"part": "smoke", "at": 1, "what": "twins", "mode": "exact", "difference": 1e-4},
        {"part": "smoke", "at": 2, "what": "FAIL RuntimeError: no kernel image"},
    ]
    ours = "32 B a lane, 2 vectors"
    probed = [
        {"part": "nll", "what": "T 32", "variant": "as is", "us": 30.0, "same_bits": True},
        {"part": "nll", "what": "T 32", "variant": "4 warps", "us": 20.0, "same_bits": False},
        {"part": "lanes", "what": "pair", "variant": "32 B a lane, 1 vectors", "us": 120},
        {"part": "lanes", "what": "pair", "variant": "16 B contiguous, 2 vectors", "us": 110},
        {"part": "lanes", "what": "pair", "variant": "32 B a lane, 2 vectors", "us": 100},
        {
            "part": "lanes",
            "what": "pair",
            "variant": "32 B a lane, 2 vectors, persistent",
            "us": 90,
        },
    ]
    lora = [
        {"case": "opt-13b q_proj r8 T=64", "path": "slots and products", "ratio": 1.0},
        {"case": "opt-13b q_proj r8 T=64", "path": "cuda", "ratio": 1.2},
        {"case": "opt-13b q_proj r8 T=4096", "path": "cuda", "ratio": 1.6},
    ]
    plan = {
        "tests": {"status": 1, "print": failed},
        "smoke": {"rows": {"smoke.jsonl": rows}},
        "probe": {"rows": {"probe.jsonl": probed, "perturbed_lora.jsonl": lora}},
    }
    status, printed = box.run(1, plan)
    assert status == 1
    for line in (
        "tests: 3 failed, 5 passed",
        "FAILED tests/kernels/test_x.py::test_bits[cuda]",
        "smoke 1 TWINS DIFFER: mode=exact difference=0.0001",
        "smoke 2 FAIL RuntimeError: no kernel image: ",
        "probe nll T 32: as is 30.0 us; best 4 warps 20.0 us, x1.50, OTHER BITS",
        "perturbed_lora: best cuda x1.2 of slots + products (opt-13b q_proj r8 T=64): goes",
        f"probe lanes pair: {ours} 100 us; best {ours} 100 us, x1.00",
        "next: TESTS='not (test_bits)' bash bench/gpu/contact.sh 2",
    ):
        assert line in printed.splitlines()


def test_a_file_that_was_cut_off_ends_no_call(box):
    """A stage may be ended while it writes a table; its rows are in another file."""
    row = {"case": "a", "path": "cuda", "p50_us": 3.0, "ratio": 2.0, "percent_of_copy": 90}
    row |= {"percent_of_torch_copy": 80}
    half = {
        "tests": {"cut": {"directions.json": '{"rows": ['}, "rows": {"directions.jsonl": [row]}}
    }
    status, printed = box.run(1, half)
    assert status == 0, printed
    assert "directions a: cuda 3.0 us, x2.0, 90 % of copy, 80 % of torch's" in printed.splitlines()
    wrong = {"tests": {"rows": {"directions.jsonl": [{"path": "cuda", "percent_of_copy": 1}]}}}
    status, printed = box.run(1, wrong)
    assert status == 0
    assert "verdict: kernels: KeyError: 'case'" in printed.splitlines()
    assert box.stages(1)["experiments"]["status"] == "0"
