"""Questions of whole steps without a GPU: their cases, their shapes, their baseline, small runs."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import mezo
from bench import decoders, e2e, runner, step
from bench.runner import Bench
from bench.step_candidates import PARTS, SlotLoop, take_turns
from tests.support.tiny import load_model


def bench_of(question, *arguments):
    options = runner.parser_of(question).parse_args(["--device", "cpu", *arguments])
    return Bench(options, {})


def test_dry_run_prints_the_cases(capsys):
    assert runner.main(e2e.QUESTION, ["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "opt-1.3b b16 sst2: 1.31 G parameters"
    assert len(lines) == 3
    assert runner.main(e2e.QUESTION, ["--dry-run", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12


def cases_of(*arguments):
    return e2e.cases(bench_of(e2e.QUESTION, *arguments).options)


def test_times_come_first_and_the_agreement_last():
    names = [case.name for case in cases_of("--shapes", "opt-13b")]
    assert names == ["opt-13b b16 sst2", "agreement"]
    assert [c.name for c in cases_of("--no-agreement", "--shapes", "tiny")] == ["tiny b16 sst2"]


def test_a_case_that_a_card_cannot_hold_is_left_out(monkeypatch):
    known = {case.name: case for case in cases_of("--all")}
    # OPT-13B: 26 GB of weights in the engine, 26 GB in the loop's model, 85 GB of KV.
    assert e2e.needed_bytes(known["opt-13b b16 sst2"]) == pytest.approx(65e9, rel=0.05)
    assert e2e.needed_bytes(known["opt-13b b64 long"]) == pytest.approx(137e9, rel=0.05)

    class Card:
        total_memory = 80_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert e2e.why_too_large(known["opt-13b b16 sst2"], "cuda") is None
    reason = e2e.why_too_large(known["opt-13b b64 long"], "cuda")
    assert reason.startswith("It needs 137 GB of 80 GB")
    assert e2e.why_too_large(known["opt-13b b64 long"], "cpu") is None


@pytest.mark.parametrize("name", ["opt-1.3b", "opt-13b", "llama-3.1-8b"])
def test_shapes_have_the_sizes_that_they_print(name):
    shape = decoders.shapes()[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        shape.num_parameters(), rel=0.01
    )


def test_the_plain_loop_is_one_forward_a_sign_and_puts_theta_back(tiny_model_dir):
    config = decoders.make_config(lr=1e-3, eps=1e-2)
    batch = decoders.make_batch(random.Random(0), 3, (4, 9), 500)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        loop = SlotLoop(run, batch)
        assert loop.loss() == run.evaluate(batch).loss
        before = [parameter.clone() for parameter in loop.parameters]
        loop.step()
        moved = [(a - b).abs().max() for a, b in zip(before, loop.parameters, strict=True)]
        assert 0 < max(moved) < 0.1
        assert loop.loss() != run.evaluate(batch, base=True).loss


def test_runs_take_turns_with_the_plain_loop(tiny_model_dir):
    config = decoders.make_config(lr=1e-3, eps=1e-2)
    batch = decoders.make_batch(random.Random(0), 3, (4, 9), 500)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        plain = {"plain loop": SlotLoop(run, batch).step}
        rows = take_turns(plain, {"transformers, exact": run}, batch, 2, warm_up=1)
    assert [row["name"] for row in rows] == ["plain loop", "transformers, exact"]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["tokens"] is None
    assert rows[1]["tokens"] > 0
    assert set(rows[1]["shares"]) == {"weights", "score"}
    rows = [{"case": "tiny", **row} for row in rows]
    check = {"lora_backend": "x", "ok": True, "grad_rms": 1.0, "floors": {"exact": 0.0}}
    check |= {f"{w}_error{e}": 1e-3 for w in ("loss", "grad") for e in ("", "_pytorch")}
    facts = {"rows": rows, "notes": [], "agreement": [check]}
    text = e2e.report(facts)
    assert "| tiny | plain loop | 1.00 |" in text
    assert "- x: ok; loss error 1.00e-03" in text


def test_a_stopwatch_that_fails_costs_no_row(monkeypatch, tiny_model_dir):
    from bench import step_candidates

    def fails(*arguments):
        raise RuntimeError("stopwatch")

    monkeypatch.setattr(step_candidates, "profile", fails)
    config = decoders.make_config(lr=1e-3, eps=1e-2)
    batch = decoders.make_batch(random.Random(0), 2, (4, 9), 500)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        plain = {"plain loop": SlotLoop(run, batch).step}
        rows = take_turns(plain, {"sglang, exact": run}, batch, 2, warm_up=1)
    assert [row["parts"] for row in rows] == [{}, {}]
    assert rows[1]["ratio"] > 0


def row_of(name, first_loss, parts=None):
    return {
        "name": name,
        "ratio": 2.0,
        "first_loss": first_loss,
        "tokens": 3,
        "reused_tokens": None,
        "shares": {},
        "parts": parts or {},
    }


def test_engines_that_differ_in_a_loss_fail():
    names = (step.PLAIN, *step.EXACT)
    bench = bench_of(step.QUESTION)
    equal = [row_of(name, 0.5) for name in names]
    assert step.checked(equal, bench) is equal
    rows = step.checked(
        [row_of(n, loss) for n, loss in zip(names, (None, 0.5, 0.6), strict=True)], bench
    )
    assert len(bench.notes) == 2
    table = runner.table(rows, step.COLUMNS)
    assert f"| {step.PLAIN} | 2.00 | 3 |" in table
    assert "| sglang, exact | FAIL | 3 |" in table


def test_an_engine_above_the_gate_fails(monkeypatch):
    checks = [{"ok": False, "lora_backend": "csgmv"}, {"ok": True, "lora_backend": "triton"}]
    monkeypatch.setattr(e2e, "agreement", lambda *arguments: checks)
    bench = bench_of(e2e.QUESTION)
    e2e.measure(e2e.cases(bench.options)[-1], bench)
    assert bench.facts["agreement"] == checks
    assert bench.notes == ["FAIL agreement: csgmv: errors are above the gate"]


@pytest.mark.sglang
@pytest.mark.usefixtures("no_engine_noise")
def test_a_small_step_on_the_cpu(tiny_model_dir):
    batch = mezo.Batch(
        prompts=["w11 w12 w13 w14", "w15 w16"], options=[" bad", " good"], labels=[0, 1]
    )
    config = mezo.MeZOConfig(
        rank=4, target_modules=["q_proj", "v_proj"], lr=1e-3, eps=1e-2, invocation=" w20 w21"
    )
    bench = bench_of(step.QUESTION, "--rounds", "2")
    step.measure(step.Demo(tiny_model_dir("llama"), batch, config), bench)
    assert bench.notes == []
    assert [row["name"] for row in bench.rows] == [step.PLAIN, *step.EXACT, step.ACTIVATED]
    assert set(bench.rows[-1]["parts"]) <= set(PARTS)
    text = step.report({"rows": bench.rows, "notes": []})
    assert text.count("| sglang, activated, prompts cached |") == 2
