"""bench.directions: its cases, the bits of its calls, a small run; its calls one by one.

`pytest tests/bench --benchmark-enable` times the calls.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import mezo_kernels as mk
from bench import directions, directions_cases, runner
from bench.baselines import torch_loop
from bench.directions import Generation, on_isa, vector_isas
from bench.directions_cases import Buffers, Case
from bench.shapes import MODELS, lora_specs
from mezo_kernels import _native

needs_native = pytest.mark.skipif(
    _native.import_error is not None, reason="the native module is not built"
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch):
    """The cases of a CPU with two layers of the model."""
    specs = lora_specs("smollm2-135m")[:28]
    monkeypatch.setattr(directions_cases, "lora_specs", lambda *arguments: specs)


def run(*arguments):
    return runner.main(directions.QUESTION, ["--device", "cpu", *arguments])


@needs_native
@pytest.mark.usefixtures("small")
def test_a_small_run_on_the_cpu(tmp_path, capsys):
    assert run("--rounds", "2", "--out", str(tmp_path)) == 0
    facts = json.loads((tmp_path / "directions.json").read_text())
    paths = {(row["what"].split(":")[0], row["dtype"], row["path"]) for row in facts["rows"]}
    for what in ("pair", "step", "one pass"):
        for dtype in ("bfloat16", "float32"):
            assert {(what, dtype, path) for path in ("torch loop", *vector_isas())} <= paths
    assert ("threads", "float32", "1 threads") in paths
    assert all(row["ns_per_element"] > 0 for row in facts["rows"])
    # The table is made of the JSON only.
    assert directions.report(facts) == (tmp_path / "directions.md").read_text()


@needs_native
@pytest.mark.usefixtures("small")
def test_bits_that_differ_fail_and_have_no_time(monkeypatch, capsys):
    isa = vector_isas()[0]
    found = {"avx2": 0}

    def complaint(case):
        found["avx2"] += 1
        return "differs from the bits of the reference" if found["avx2"] == 1 else None

    monkeypatch.setattr(directions, "complaint_of_cpu", complaint)
    assert run("--rounds", "2", "--only", "update", "--no-write") == 1
    printed = capsys.readouterr().out
    assert f"| one pass: theta += c z | bfloat16 | {isa} | FAIL | FAIL | FAIL |" in printed
    assert f"| one pass: theta += c z | float32 | {isa} | FAIL" not in printed


@needs_native
@pytest.mark.parametrize("what", ["pair", "step", "update"])
def test_the_check_sees_other_bits(monkeypatch, what):
    case = Case(what, "smollm2-135m", dtype=torch.float32)
    assert directions_cases.complaint_of_cpu(case) is None
    real = Buffers.on_host

    def other(self, backend):
        call = real(self, backend)

        def run():
            call()
            if backend == "cpu":
                self.everything()[-1].view(torch.int32)[0, 0] ^= 1

        return run

    monkeypatch.setattr(Buffers, "on_host", other)
    assert directions_cases.complaint_of_cpu(case) == "differs from the bits of the reference"


def test_dry_run_prints_the_cases_of_a_gpu(capsys):
    assert run("--device", "cuda", "--dry-run") == 0
    printed = capsys.readouterr().out
    # 100 M elements, 12 bytes each; 40 layers of q and v, 8 x 5120 twice.
    assert "| step flat-100m | 1 | 100000000 | 1200000000 |" in printed
    assert "| replay opt-13b qv r8 K=10000 | 160 | 6553600 | 52428800 |" in printed


def test_the_cases_of_the_headline_come_first():
    cases = directions_cases.gpu_cases()
    assert [case.model for case in cases[:7]] == ["opt-13b"] * 6 + ["flat-100m"]
    assert cases[-1].what == "replay"
    assert len({case.name for case in cases}) == len(cases) == 34


@pytest.fixture
def every_backend(monkeypatch):
    """All backends as if they were usable; the list of what is compared, and how."""
    compared = []

    def complaint(case, backend, how):
        compared.append((backend, dict(how)))
        return "other bits" if how == {"lanes": "contiguous"} else None

    usable = SimpleNamespace(backends=lambda: dict.fromkeys(("cuda", "triton")))
    monkeypatch.setattr(directions, "mk", usable)
    monkeypatch.setattr(directions, "complaint_of_gpu", complaint)
    return compared


def test_rows_of_a_gpu_are_the_baselines_and_ours(every_backend):
    case = Case("update", "flat-100m")
    found = {candidate.name: candidate for candidate in directions.gpu_candidates(case, [])}
    assert list(found) == [
        "torch.normal loop",
        "torch.normal loop as a graph",
        "torch._foreach",
        "tl.randn",
        "cuda",
        "cuda without a graph",
        "cuda contiguous",
        "triton",
        "triton without a graph",
    ]
    lanes = ({"lanes": "wide"}, {"lanes": "contiguous"})
    assert every_backend == [("cuda", lanes[0]), ("cuda", lanes[1]), ("triton", {})]
    complaints = {name: one.complaint(None) for name, one in found.items() if one.is_ours}
    assert [name for name, wrong in complaints.items() if wrong] == ["cuda contiguous"]
    compiled = directions.gpu_candidates(case, [], with_compile=True)
    assert {candidate.name for candidate in compiled} == {*found, "torch.compile"}


@pytest.mark.parametrize("what", ["pair", "step", "update", "replay"])
@pytest.mark.parametrize("lanes", ["wide", "contiguous"])
def test_the_timed_calls_have_the_bits_of_the_cpu_backend(on_host, native, bits, lanes, what):
    case = Case(what, "smollm2-135m", num_directions=3 if what == "replay" else 1)
    ours, theirs = (Buffers(case, "cpu", case.specs[:4]) for _ in range(2))
    before = [master.clone() for master in ours.masters]
    ours.on_device("cuda", lanes=lanes)()
    theirs.on_host("cpu")()
    assert ours.has_bits_of(theirs)
    for mine, other in zip(ours.everything(), theirs.everything(), strict=True):
        assert (bits(mine) == bits(other)).all()
    changed = any((a != b).any() for a, b in zip(ours.masters, before, strict=True))
    assert changed == (what != "pair")


def test_shapes_are_those_of_the_models():
    for model, wanted in (("llama-3.1-8b", 20_971_520), ("smollm2-135m", 2_442_240)):
        specs = lora_specs(model)
        assert sum(spec.shape[0] * spec.shape[1] for spec in specs) == wanted
        assert len({spec.uid for spec in specs}) == len(specs) == 14 * MODELS[model].layers
    flat = mk.TensorSpec("flat", (50_000, 2_000))
    assert lora_specs("flat-100m") == [flat]


def test_rows_and_report_of_a_gpu():
    case = Case("step", "smollm2-135m")
    seconds = {
        "torch.normal loop": [4e-4, 4e-4],
        "cuda": [1e-5, 1e-5],
        "cuda contiguous": [8e-6, 8e-6],
    }
    timings = {
        name: directions.Timing(name, own, [4e-4 / own[0]] * 2) for name, own in seconds.items()
    }
    roofline = {
        "copy": 3e12,
        "patterns": {8: 2.8e12, 12: 2.9e12},
        "wide_multiplies": 1e13,
        "clock_hz": 1.98e9,
        "multiprocessors": 132,
    }
    rows = directions.gpu_rows(case, timings, roofline, l2_bytes=50 << 20)
    assert [row["ratio"] for row in rows] == [1.0, 40.0, 50.0]
    assert "percent_of_copy" not in rows[0]
    assert rows[1]["percent_of_copy"] == round(100 * case.nbytes / 1e-5 / 2.9e12, 1)
    torch_copies = [row.get("percent_of_torch_copy") for row in rows]
    rate = 100 * case.nbytes / 1e-5 / 3e12
    assert torch_copies == [None, round(rate, 1), round(rate / 0.8, 1)]
    facts = {"device": "none", "roofline": roofline, "notes": [], "rows": rows}
    text = directions.report(json.loads(json.dumps(facts)))
    assert text == directions.report(facts)
    assert "12 B: 2900 GB/s" in text


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request):
    return request.param


@needs_native
@pytest.mark.parametrize("what", ["pair", "step", "update"])
@pytest.mark.parametrize("path", ["torch", "ours"])
def test_time_of_a_call(benchmark, dtype, what, path):
    case = Case(what, "smollm2-135m", dtype=dtype)
    benchmark.extra_info["elements"] = case.num_elements
    buffers = Buffers(case, "cpu", case.specs)
    tensors = [master.to(dtype, copy=True) for master in buffers.masters]
    benchmark(torch_loop(what, tensors, seed=0) if path == "torch" else buffers.on_host("cpu"))


@pytest.mark.parametrize("isa", vector_isas() if _native.import_error is None else [])
def test_time_of_generation(benchmark, isa):
    benchmark.extra_info["elements"] = directions.GENERATION_ELEMENTS
    benchmark(on_isa(isa, directions.generation()))


def test_generation_is_a_case_of_the_cpu_only():
    def names(device):
        options = runner.parser_of(directions.QUESTION).parse_args(["--device", device])
        return [case for case in directions.cases(options) if isinstance(case, Generation)]

    assert [case.name for case in names("cpu")] == ["generation", "threads"]
    assert names("cuda") == []
