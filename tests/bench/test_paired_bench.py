"""bench.paired without a GPU: its list of cases, its forms, rows, points and report."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.experiments.attention import flashinfer as backend
from tests.bench.experiments import fake_flashinfer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    """bench.paired_gpu, with a small case."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import paired_gpu

    return paired_gpu


def case_of(bench, **changes):
    sizes = {"num_groups": 2, "num_rows": 3, "heads": 4, "kv_heads": 2, "dim": 64} | changes
    return bench.AttentionCase((20, 20), 3, **sizes)


def timer_of(bench):
    from bench.timing import interleave

    return lambda calls, rounds: interleave(calls, rounds, warm_up=0)


def broken(one):
    raise ImportError("No module named 'elsewhere'\nand more of it")


def test_dry_run_lists_the_cases():
    command = [sys.executable, "-m", "bench.paired", "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("gpu attention")]
    assert len(lines) == 4 * 4 * 3 * 3
    # 8 prefixes of 256 and 16 tokens, keys and values of 8 heads x 128; q and result of 32 heads.
    nbytes = 2 * 128 * (2 * 8 * (8 * 256 + 16) + 2 * 32 * 16)
    shape = "8 groups x 2 rows, prefix 256, suffix 1, heads 32/8 x 128"
    assert lines[0] == f"gpu attention: {shape}, {nbytes} bytes"
    assert "gpu label loss: T 512, V 131072, D_in 4096" in result.stdout


def test_quick_cases_come_first(bench):
    quick, everything = bench.gpu_attention(quick=True), bench.gpu_attention()
    assert len(quick) == 12
    assert everything[:12] == quick
    assert len(set(everything)) == len(everything) == 144
    assert {case.gqa for case in everything} == {1, 4, 8}


def test_every_form_has_a_label(bench):
    assert list(bench.FORMS) == list(bench.LABELS)
    assert set(bench.NOT_SHARING) < set(bench.FORMS)


def test_forms_that_fail_or_err_are_left_out(bench, monkeypatch):
    tried = []

    def absent(one):
        tried.append(one)
        return broken(one)

    def off(one):
        return lambda: one.ours("cpu") * 1.1

    forms = {"two_pass": absent, "sdpa": bench.sdpa, "triton": lambda one: lambda: one.ours("cpu")}
    monkeypatch.setattr(bench, "FORMS", forms | {"flashinfer": off})
    found = bench.Forms()
    for _ in range(2):
        one = bench.Attention(case_of(bench), torch.float32, "cpu")
        calls, notes = found.usable(one)
        assert list(calls) == ["sdpa", "triton"]
        assert notes[-1].startswith("FAIL 2 groups x 3 rows")
    assert len(tried) == 1
    monkeypatch.setattr(bench, "COPIES_LIMIT", 0)
    calls, notes = found.usable(one)
    assert list(calls) == ["triton"]
    assert notes[0].startswith("SDPA, prefix per row: left out. RuntimeError: copies of the prefix")
    # It ran before, so the next shape may have room for it.
    monkeypatch.setattr(bench, "COPIES_LIMIT", 1 << 30)
    assert list(found.usable(one)[0]) == ["sdpa", "triton"]


def test_forms_of_flashinfer_on_its_stand_in(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(backend, "reason_against", lambda device_type: None)
    one = bench.Attention(case_of(bench), torch.bfloat16, "cpu")
    for name in ("flashinfer_per_row", "flashinfer"):
        call = bench.FORMS[name](one)
        one.out.fill_(torch.nan)
        assert one.error(call()) <= bench.TOLERANCE


def test_rows_points_and_report(bench, monkeypatch):
    from bench import paired
    from bench.timing import Timing

    case = case_of(bench)
    seconds = {"sdpa": [4e-5, 4e-5], "sglang_triton": [3e-5, 3e-5], "triton": [1e-5, 1.5e-5]}
    timings = {name: Timing(name, times, [1.0, 1.0]) for name, times in seconds.items()}
    rows = bench.attention_rows(case, timings, copy_rate=case.nbytes / 5e-6)
    # The baseline is the fastest form without sharing, wherever it stands.
    assert [row["ratio"] for row in rows] == [0.75, 1.0, 2.5]
    assert [row["path"].endswith("(baseline)") for row in rows] == [False, True, False]
    assert [row["percent_of_copy"] for row in rows] == [12.5, 16.7, 40.0]
    assert bench.point_of(case, timings) == {
        "prefix": 20,
        "suffix": 3,
        "rows": 3,
        "gqa": 2,
        "head_dim": 64,
        "us": {"sdpa": 40.0, "sglang_triton": 30.0, "triton": 12.5},
    }
    text = paired.report(rows, {"device": "none"}, ["two_pass: left out."])
    assert "| ratio | us | p20 - p80 | % of copy |" in text
    assert "L2 cold" in text
    assert "* two_pass: left out.\n\nMeasured with: device none." in text
    plain = [{key: row[key] for key in row if key != "percent_of_copy"} for row in rows]
    assert "| ratio | us | p20 - p80 |\n" in paired.report(plain, {})
    assert "One thread" in paired.report(plain, {})


def test_label_rows(bench, monkeypatch):
    real = bench.label_calls

    def with_liger(*arguments):
        calls = real(*arguments)
        return {**calls, bench.LIGER: lambda: broken(None)}

    monkeypatch.setattr(bench, "label_calls", with_liger)
    rows, notes = bench.label_rows(4, 50, 16, torch.float32, "cpu", 3, timer_of(bench))
    assert [row["path"] for row in rows] == ["linear + log_softmax", "linear alone", "label_nll"]
    assert notes == [f"{bench.LIGER}: left out. ImportError: No module named 'elsewhere'"]
    assert rows[0]["ratio"] == 1.0
    assert all("peak_mib" in row for row in rows)
