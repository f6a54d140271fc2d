"""bench.paired without a GPU: its list of cases, its kernels, rows, points and report."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import attention_kernels, paired, paired_cases, runner
from bench.experiments.attention import flashinfer as backend
from bench.paired_cases import Attention, AttentionCase, LabelCase, LoraCase
from bench.runner import Bench, Candidate
from bench.timing import Timing
from tests.bench.experiments import fake_flashinfer


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case_of(**changes):
    sizes = {"num_groups": 2, "num_rows": 3, "heads": 4, "kv_heads": 2, "dim": 64} | changes
    return AttentionCase((20, 20), 3, **sizes)


def bench_of():
    options = runner.parser_of(paired.QUESTION).parse_args(["--device", "cpu", "--rounds", "2"])
    bench = Bench(options, {})
    paired.begin(bench)
    return bench


def broken(one):
    raise ImportError("No module named 'elsewhere'\nand more of it")


def test_dry_run_lists_the_cases(capsys):
    assert runner.main(paired.QUESTION, ["--device", "cuda", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("attention, per layer: ")]
    assert len(lines) == 4 * 4 * 3 * 3
    # 8 prefixes of 256 and 16 tokens, keys and values of 8 heads x 128; q and result of 32 heads.
    nbytes = 2 * 128 * (2 * 8 * (8 * 256 + 16) + 2 * 32 * 16)
    shape = "8 groups x 2 rows, prefix 256, suffix 1, heads 32/8 x 128"
    assert lines[0] == f"attention, per layer: {shape}, {nbytes} bytes"
    assert "label loss: T 512, V 131072, D_in 4096" in printed
    assert runner.main(paired.QUESTION, ["--device", "cpu", "--dry-run"]) == 0
    assert "LoRA of a pair: T 96, r 8" in capsys.readouterr().out


def test_quick_cases_come_first():
    quick, everything = paired_cases.gpu_attention(quick=True), paired_cases.gpu_attention()
    assert len(quick) == 12
    assert everything[:12] == quick
    assert len(set(everything)) == len(everything) == 144
    assert {case.gqa for case in everything} == {1, 4, 8}


def test_every_kernel_has_a_label():
    assert list(attention_kernels.KERNELS) == list(attention_kernels.LABELS)
    assert set(attention_kernels.NOT_SHARING) < set(attention_kernels.KERNELS)


def test_a_small_run_on_the_cpu(monkeypatch, tmp_path):
    cases = [case_of(), LabelCase(4, 50, 16), LoraCase(6)]
    monkeypatch.setattr(paired, "cpu_cases", lambda: cases)
    arguments = ["--device", "cpu", "--rounds", "2", "--out", str(tmp_path), "--name", "small"]
    assert runner.main(paired.QUESTION, arguments) == 0
    facts = json.loads((tmp_path / "small.json").read_text())
    assert [row["what"] for row in facts["rows"]] == [
        *["attention, per layer"] * 4,
        *["label loss"] * 3,
        *["LoRA of a pair"] * 2,
    ]
    assert facts["points"] == []
    assert (tmp_path / "small.md").read_text() == paired.report(facts)


def test_outputs_that_differ_fail(monkeypatch):
    monkeypatch.setattr(Attention, "row_loop", lambda one: one.torch_native() * 1.01)
    monkeypatch.setattr(paired_cases.PairLora, "ours", lambda one: one.modules[0][3].add_(1e-2))
    real = paired_cases.mk.label_nll
    monkeypatch.setattr(paired_cases.mk, "label_nll", lambda *arguments: real(*arguments) + 1e-3)
    bench = bench_of()
    for case in (case_of(), LabelCase(4, 50, 16), LoraCase(6)):
        paired.measure(case, bench)
    failed = [row["path"] for row in bench.rows if "fail" in row]
    assert failed == ["SDPA per row, own queries", "label_nll", "SegmentedLora"]
    assert "FAIL" in runner.table(bench.rows, paired.COLUMNS)


def test_kernels_that_fail_or_err_are_left_out(monkeypatch):
    tried = []

    def absent(one):
        tried.append(one)
        return broken(one)

    def off(one):
        return lambda: one.ours("cpu") * 1.1

    kernels = {
        "two_pass": absent,
        "sdpa": attention_kernels.sdpa,
        "triton": lambda one: lambda: one.ours("cpu"),
        "flashinfer": off,
    }
    monkeypatch.setattr(paired, "KERNELS", kernels)
    bench = bench_of()
    labels = paired.labels_of(case_of())
    one = Attention(case_of(), torch.float32, "cpu")

    def usable():
        return list(bench.usable(labels, paired.attention_candidates(one, "cuda")))

    for _ in range(2):
        assert usable() == ["sdpa", "triton"]
        assert bench.notes[-1].startswith("FAIL attention, per layer, 2 groups x 3 rows")
    assert len(tried) == 1
    monkeypatch.setattr(attention_kernels, "COPIES_LIMIT", 0)
    assert usable() == ["triton"]
    assert "sdpa: left out. RuntimeError: copies of the prefix for each row exceed" in "\n".join(
        bench.notes
    )
    # It ran before, so the next shape may have room for it.
    monkeypatch.setattr(attention_kernels, "COPIES_LIMIT", 1 << 30)
    assert usable() == ["sdpa", "triton"]


def test_kernels_of_flashinfer_on_its_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(backend, "reason_against", lambda device_type: None)
    one = Attention(case_of(), torch.bfloat16, "cpu")
    for name in ("flashinfer_per_row", "flashinfer"):
        call = attention_kernels.KERNELS[name](one)
        one.out.fill_(torch.nan)
        assert one.error(call()) <= paired.ATTENTION_LIMIT["cuda"]


def test_rows_points_and_report():
    case = case_of()
    seconds = {"sdpa": [4e-5, 4e-5], "sglang_triton": [3e-5, 3e-5], "triton": [1e-5, 1.5e-5]}
    timings = {name: Timing(name, times, [1.0, 1.0]) for name, times in seconds.items()}
    rows = paired.attention_rows(case, timings, copy_rate=case.nbytes / 5e-6)
    # The baseline is the fastest kernel that does not share, wherever it stands.
    assert [row["ratio"] for row in rows] == [0.75, 1.0, 2.5]
    assert [row["path"].endswith("(baseline)") for row in rows] == [False, True, False]
    assert [row["percent_of_copy"] for row in rows] == [12.5, 16.7, 40.0]
    assert paired.point_of(case, timings) == {
        "prefix": 20,
        "suffix": 3,
        "rows": 3,
        "gqa": 2,
        "head_dim": 64,
        "us": {"sdpa": 40.0, "sglang_triton": 30.0, "triton": 12.5},
    }
    facts = {"device": "none", "notes": ["two_pass: left out."], "rows": rows}
    text = paired.report(facts | {"copy_bytes_per_second": 3e12})
    assert "| ratio | us | p20 - p80 | % of copy |" in text
    assert "L2 cold" in text
    assert "* two_pass: left out.\n\nMeasured with: device none." in text
    assert "| ratio | us | p20 - p80 |\n" in paired.report(facts)
    assert "One thread" in paired.report(facts)


def test_liger_is_left_out_where_it_is_missing(monkeypatch):
    real = paired.label_calls

    def with_liger(*arguments):
        return {**real(*arguments), paired.LIGER: lambda: broken(None)}

    monkeypatch.setattr(paired, "label_calls", with_liger)
    bench = bench_of()
    paired.measure(LabelCase(4, 50, 16), bench)
    assert [row["path"] for row in bench.rows] == [
        "linear + log_softmax",
        "linear only",
        "label_nll",
    ]
    assert bench.notes == [f"{paired.LIGER}: left out. ImportError: No module named 'elsewhere'"]
    assert bench.rows[0]["ratio"] == 1.0


def test_candidates_of_a_gpu_are_the_kernels():
    one = Attention(case_of(), torch.float32, "cpu")
    candidates = paired.attention_candidates(one, "cuda")
    assert all(isinstance(candidate, Candidate) for candidate in candidates)
    assert [candidate.name for candidate in candidates] == list(attention_kernels.KERNELS)
