"""The benchmark of perturbed_lora without a GPU: its cases, and the calls that it times."""

import subprocess
import sys

from tests.support.source import ROOT


def test_dry_run_of_perturbed_lora_prints_the_cases():
    command = [
        sys.executable,
        "-m",
        "bench.experiments.lora.measure",
        "--dry-run",
        "--only",
        "down_proj r8",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # 8 x (14336 + 4096) elements, written and read in bf16, in two slots.
    line = "| llama-3.1-8b down_proj r8 T=16 | 32 | 14336 | 4096 | 32 | 147456 | 1179648 |"
    assert line in result.stdout


def test_the_timed_backends_add_what_the_slots_add(monkeypatch, on_host):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.experiments.lora import measure as bench

    case = bench.Case("smollm2-135m", "self_attn.v_proj", 16, 20)
    assert bench.difference(case, "cuda", "cpu", "cuda", num_layers=2) < 2**-6

    def exchanged(buffers, backend):
        buffers.write_slots("cuda")
        buffers.slots.reverse()
        buffers.products()

    # At a large eps it sees the signs exchanged.
    monkeypatch.setattr(bench, "EPS", 0.5)
    assert bench.difference(case, "cuda", "cpu", "cuda") < 2**-6
    monkeypatch.setattr(bench.Buffers, "inside", exchanged)
    assert bench.difference(case, "cuda", "cpu", "cuda") > 0.5
