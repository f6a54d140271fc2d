"""The GPU benchmarks without a GPU: their plans of cases, and the calls that they time."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mezo_kernels as mk

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_cases(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu_cases

    return gpu_cases


def test_dry_run_prints_the_cases():
    command = [sys.executable, "-m", "bench.gpu_directions", "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # 100 M elements, 12 bytes each; 40 layers of q and v, 8 x 5120 twice.
    assert "| step flat-100m | 1 | 100000000 | 1200000000 |" in result.stdout
    assert "| replay opt-13b qv r8 K=10000 | 160 | 6553600 | 52428800 |" in result.stdout


@pytest.mark.parametrize("what", ["pair", "step", "update", "replay"])
def test_the_timed_calls_have_the_bits_of_the_cpu_backend(gpu_cases, on_host, native, bits, what):
    case = gpu_cases.Case(what, "smollm2-135m", num_directions=3 if what == "replay" else 1)
    specs = case.specs[:4]
    ours = gpu_cases.Buffers(case, "cpu", specs)
    theirs = gpu_cases.Buffers(case, "cpu", specs)
    before = [master.clone() for master in ours.masters]
    ours.ours("cuda")()
    theirs.on_cpu()
    for mine, other in zip(ours.everything(), theirs.everything(), strict=True):
        assert (bits(mine) == bits(other)).all()
    changed = any((a != b).any() for a, b in zip(ours.masters, before, strict=True))
    assert changed == (what != "pair")


def test_shapes_are_those_of_the_models(gpu_cases):
    from bench.shapes import MODELS, lora_specs

    for model, wanted in (("llama-3.1-8b", 20_971_520), ("smollm2-135m", 2_442_240)):
        specs = lora_specs(model)
        assert sum(spec.shape[0] * spec.shape[1] for spec in specs) == wanted
        assert len({spec.uid for spec in specs}) == len(specs) == 14 * MODELS[model].layers
    flat = mk.TensorSpec("flat", (50_000, 2_000))
    assert lora_specs("flat-100m") == [flat]


def test_a_case_that_fails_or_has_no_time_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu_main

    cases = [SimpleNamespace(name=name) for name in ("a r8", "b r8", "c r16")]
    rows = []

    def measure(case):
        if case.name == "b r8":
            raise RuntimeError("out of memory")
        rows.append({"case": case.name})
        return [f"{case.name}: said"]

    notes = gpu_main.measure_all(cases, measure, budget_s=60, only="r8")
    assert notes == ["a r8: said", "FAIL b r8: RuntimeError: out of memory"]
    assert gpu_main.write(tmp_path / "new", "x", "# text", {"rows": rows, "notes": notes}) == 1
    assert gpu_main.write(tmp_path, "x", "# text", {"rows": rows, "notes": notes[:1]}) == 0
    assert gpu_main.write(tmp_path, "x", "# text", {"rows": [], "notes": []}) == 1
    assert (tmp_path / "new" / "x.md").read_text() == "# text"
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"rows": rows, "notes": notes}
    assert gpu_main.measure_all(cases[:1], measure, budget_s=-1, only="") == [
        "FAIL a r8: left out, -1 s were over"
    ]
