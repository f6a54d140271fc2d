"""bench.replay: a small run, its table, and a check that sees other bits."""

from __future__ import annotations

import json

import pytest
import torch

from bench import replay, runner
from bench.directions import vector_isas
from bench.shapes import lora_specs
from mezo_kernels import _native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_native.import_error is not None, reason="the native module is not built"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Four tensors of the adapter."""
    specs = lora_specs("smollm2-135m")[:4]
    monkeypatch.setattr(replay, "specs", lambda: specs)


def run(*arguments):
    return runner.main(replay.QUESTION, ["--device", "cpu", "--rounds", "2", *arguments])


def test_a_small_run(tmp_path, capsys):
    assert run("--run-steps", "5", "--out", str(tmp_path)) == 0
    facts = json.loads((tmp_path / "replay.json").read_text())
    found = {(row["case"], row["path"]) for row in facts["rows"]}
    paths = ("torch.randn", *vector_isas())
    assert found == {(case, path) for case in ("100 steps", "1000 steps") for path in paths}
    assert all(row["ns_per_normal"] > 0 for row in facts["rows"])
    assert facts["tensors"] == 4
    assert facts["run"]["steps"] == 5
    assert "A run of 5 steps took" in capsys.readouterr().out
    # The table is made of the JSON only.
    assert replay.report(facts) == (tmp_path / "replay.md").read_text()


def test_bits_that_differ_fail_and_have_no_time(monkeypatch, capsys):
    assert replay.complaint() is None
    real = replay.ours

    def other(*arguments, **options):
        call = real(*arguments, **options)

        def changed():
            tensors = call()
            if options.get("backend") == "reference":
                tensors[-1].view(torch.int32)[0, 0] ^= 1
            return tensors

        return changed

    monkeypatch.setattr(replay, "ours", other)
    assert run("--only", "100 steps", "--no-write") == 1
    assert f"| 100 steps | {vector_isas()[0]} | FAIL | FAIL |" in capsys.readouterr().out
