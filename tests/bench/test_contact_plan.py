"""What the calls on a GPU box run, and in which order; that it is there and needs nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import contact
from bench.gpu.contact import CALLS, LIMITS, Host
from tests.support.source import ROOT

BOX = ROOT / "tests" / "support" / "gpu_box"


def test_what_decides_comes_before_what_may_be_cut_off():
    names = [stage.name for stage in CALLS[2](Host("python", Path("x"), dry=False))]
    decisions = ["perturbed_lora", "paired", "directions"]
    assert names == ["build", "usable", *decisions, "memcheck", "racecheck", "tests", "experiments"]


def test_a_verdict_is_short_and_keeps_its_end(tmp_path):
    from bench.gpu import verdict

    with (tmp_path / "smoke.jsonl").open("w") as file:
        for i in range(5000):
            file.write(json.dumps({"what": "steps", "at": i, "words": "x" * 300}) + "\n")
        file.write('{"what": "cut o')
    (tmp_path / "stages.jsonl").write_text(
        json.dumps({"name": "build", "status": "0", "seconds": 1.0, "at": 1.0})
        + "\n"
        + json.dumps({"name": "probe", "status": "9", "seconds": 1.0, "at": 2.0})
        + "\n"
    )
    (tmp_path / "probe.log").write_text("")
    found = verdict.text(tmp_path, 1)
    assert len(found) < 12_000
    assert found.splitlines()[-2:] == [
        "stage probe: 9, 1.0 s, at 2.0 s",
        "next: bash bench/gpu/contact.sh 2",
    ]
    assert "... the archive has the rest" in found


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_no_stage_has_a_typo(call, dry, monkeypatch):
    """Modules, files and needs that a stage names are there; none is longer than its call."""
    found = CALLS[call](Host("python", Path("x"), dry=dry))
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    for i, stage in enumerate(found):
        assert set(stage.needs) <= set(names[:i])
        assert 0 < stage.seconds < LIMITS[call]
        command = list(stage.command)
        if "-m" in command and command[0] in ("python", "compute-sanitizer"):
            module = command[command.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None
        for word in command:
            if word.startswith(("tests/", "bench/")) and " " not in word:
                assert (ROOT / word).exists()
            if "=tests/" in word:
                assert (ROOT / word.split("=")[1]).exists()


def test_the_calls_need_no_package():
    """A box that lacks one still has a call that says so."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "bench.gpu.contact", "--help"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


# What the box's Python lacks, of what this host has.
ABSENT = ("platformdirs", "ruff", "mypy")
ON_THE_BOX = (
    "bench.e2e",
    "bench.gpu.smoke",
    "bench.gpu.probe",
    "bench.gpu.facts",
    "bench.gpu.install",
    "bench.directions",
    "bench.paired",
    "bench.experiments.lora.measure",
    "mezo",
)


def test_what_runs_on_the_box_imports_nothing_that_it_lacks():
    code = (
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({ABSENT}))\n"
        f"for name in {ON_THE_BOX}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_copy_without_git_has_the_commit_that_it_is_told(monkeypatch):
    from bench import environment

    monkeypatch.setattr(environment, "_output", lambda *command: "")
    monkeypatch.setenv("MEZO_COMMIT", "abc1234")
    assert environment.environment("cpu")["commit"] == "abc1234"
    monkeypatch.delenv("MEZO_COMMIT")
    assert environment.environment("cpu")["commit"] == "unknown"


def test_the_architecture_is_that_of_the_card(monkeypatch):
    monkeypatch.setenv("PATH", f"{BOX}:{os.environ['PATH']}")
    assert contact.compute_capability() == "90"
    monkeypatch.setenv("PATH", "")
    assert contact.compute_capability() == "90"


@pytest.mark.proof
@pytest.mark.sglang
def test_the_dry_runs_of_all_calls(tmp_path):
    """Wheels, build, tests, variants, engine and a step beside the plain loop, without a GPU."""
    subprocess.run(["bash", "bench/gpu/prepare.sh"], cwd=ROOT, check=True)
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    took = 0.0
    for call in CALLS:
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "bench/gpu/contact.sh", str(call), "--dry-run"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        took += time.monotonic() - started
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path)) == [f"call{call}.tgz" for call in CALLS]
    # The first build takes minutes more.
    assert took < 600
