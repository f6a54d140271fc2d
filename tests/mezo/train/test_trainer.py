"""The loop: schedule, evaluation, callbacks, the one-call form, tasks and the command line."""

from __future__ import annotations

import csv
import itertools
import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mezo
from mezo.cli import app
from mezo.config import TrainConfig
from mezo.engines import available
from mezo.train import training
from mezo.train.evaluate import evaluate, pool
from tests.support.independent import load_peft
from tests.support.tiny import LINEARS, VOCAB, load_model, random_batch

CONFIG = mezo.MeZOConfig(rank=2, target_modules=LINEARS, lr=1e-3, seed=1)


@pytest.fixture
def run(tiny_model_dir):
    with mezo.attach(load_model(tiny_model_dir("llama")), CONFIG) as run:
        yield run


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A file like the real one, in words of the tiny model's vocabulary."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for _ in range(1600):
            words = [f"w{rng.randrange(5, VOCAB)}" for _ in range(rng.randint(3, 9))]
            writer.writerow([" ".join(words), rng.randrange(2), "rotten_tomatoes"])
    return path


def test_steps_schedule_and_evaluations(run):
    rng = random.Random(0)
    fixed = random_batch(rng)
    held_out = [random_batch(rng, size=3), random_batch(rng, size=5)]
    seen = []
    trainer = mezo.MeZOTrainer(
        run,
        itertools.repeat(fixed),
        num_steps=5,
        schedule="linear",
        held_out=held_out,
        eval_every=2,
        callbacks=[seen.append],
    )
    summary = trainer.train()
    assert [p.step for p in seen if p.evaluation] == [0, 2, 4, 5]
    results = [p.result for p in seen if p.result]
    rates = [-r.coefficients[0] / r.projected_grads[0] for r in results]
    assert rates == pytest.approx([1e-3 * (1 - s / 5) for s in range(5)])
    assert summary.steps == 5
    assert summary.skipped == 0
    assert summary.tokens == sum(r.tokens for r in results)
    assert summary.before.num_examples == 8
    assert summary.after.loss == pool([run.evaluate(b) for b in held_out]).loss


def test_training_lowers_the_loss_of_a_batch(tiny_model_dir):
    batch = random_batch(random.Random(1), size=2)
    config = mezo.MeZOConfig(rank=2, target_modules=LINEARS, lr=3e-4, seed=1)
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        summary = mezo.MeZOTrainer(
            run, itertools.repeat(batch), num_steps=150, held_out=[batch]
        ).train()
    assert summary.after.loss < summary.before.loss - 1.0


def test_pooled_evaluations_weigh_examples():
    parts = [
        mezo.EvalResult(1.0, 0.5, [0, 1], 2, 10),
        mezo.EvalResult(2.0, 1.0, [1] * 6, 6, 30),
    ]
    whole = pool(parts)
    assert whole == mezo.EvalResult(1.75, 0.875, [0, 1, *[1] * 6], 8, 40)
    assert pool([mezo.EvalResult(1.0, None, None, 2, 1)]).accuracy is None


def test_the_loss_of_completions_is_the_same_for_every_batch_size(run):
    """Completions of 1 to 9 tokens: a mean of batches' means would be another."""
    rng = random.Random(7)
    ids = [[rng.randrange(5, 500) for _ in range(n)] for n in (1, 9, 2, 8, 3, 1, 7)]
    whole = run.evaluate(mezo.Batch(prompts=[[5, 6]] * 7, completions=ids))
    assert whole.loss_tokens == sum(map(len, ids))
    expected = -sum(s * len(row) for [s], row in zip(whole.scores, ids, strict=True)) / 31
    assert whole.loss == pytest.approx(expected)
    for size in (1, 2, 3):
        few = [ids[i : i + size] for i in range(0, 7, size)]
        batches = [mezo.Batch(prompts=[[5, 6]] * len(some), completions=some) for some in few]
        pooled = evaluate(run, batches)
        assert pooled.loss == pytest.approx(whole.loss, rel=1e-6)
        assert pooled.loss_tokens == whole.loss_tokens


def test_bad_trainers_raise(run):
    batch = random_batch(random.Random(2))
    with pytest.raises(ValueError, match="must be at least 1, got 0 and None"):
        mezo.MeZOTrainer(run, [batch], num_steps=0)
    with pytest.raises(ValueError, match=r"schedule must be .* got 'sqrt'"):
        mezo.MeZOTrainer(run, [batch], num_steps=1, schedule="sqrt")
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        mezo.MeZOTrainer(run, [batch], num_steps=2).train()


def test_finetune_in_one_call(tiny_model_dir, tmp_path):
    directory = tiny_model_dir("llama")
    model = load_model(directory)
    batch = random_batch(random.Random(3))
    summary = mezo.finetune(
        model, itertools.repeat(batch), num_steps=3, config=CONFIG, output=tmp_path
    )
    assert summary.steps == 3
    assert summary.before is None
    load_peft(directory, tmp_path)
    assert not any("LoraLinear" in type(m).__name__ for m in model.modules())


def test_train_command_writes_everything(tiny_model_dir, reviews, tmp_path):
    output = tmp_path / "out"
    model = tiny_model_dir("llama")
    result = CliRunner().invoke(
        app,
        "train --task rotten_tomatoes --engine transformers "
        f"--model {model} --data {reviews} --output {output} "
        "--steps 6 --batch-size 4 --eval-examples 12 --eval-every 3 --rank 2 "
        "--max-prompt-tokens 8 --seed 5 --lr 1e-3".split(),
    )
    assert result.exit_code == 0, result.output
    assert "held out, after 3 steps" in result.output
    assert "step 6/6  loss" in result.output
    summary = json.loads((output / "summary.json").read_text())
    assert summary["engine"] == "transformers"
    assert summary["steps"] == 6
    assert summary["seed"] == 5
    assert summary["seconds_per_step"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    scores = summary["held_out"]
    assert scores["before"]["num_examples"] == scores["after"]["num_examples"] == 12
    assert scores["before"]["cross_entropy"] != scores["after"]["cross_entropy"]
    assert [e["step"] for e in summary["evaluations"]] == [0, 3, 6]
    assert summary["evaluations"][-1]["loss"] == scores["after"]["cross_entropy"]
    log = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(6))
    assert all(record["status"] == "OK" for record in log)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    load_peft(model, output / "adapter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task imdb", "task must be one of: rotten_tomatoes, .* got 'imdb'"),
        ("--engine vllm", "engine must be one of: .* got 'vllm'"),
        ("--eps 0", "eps must be a finite number > 0"),
        ("--schedule sqrt", "schedule must be one of: .* got 'sqrt'"),
        ("--steps 0", "num_steps must be an integer >= 1, got 0"),
        ("--train-examples 3", "there must be a batch of 4 training examples, got 3"),
        ("--target-modules q_proj,q_proj", "distinct module names"),
        ("--max-prompt-tokens 2", "there must be a batch of 4 training examples, got 0"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny_model_dir, reviews, tmp_path, arguments, message):
    model = tiny_model_dir("llama")
    result = CliRunner().invoke(
        app,
        "train --task rotten_tomatoes --engine transformers "
        f"--model {model} --data {reviews} --output {tmp_path} "
        f"--batch-size 4 {arguments}".split(),
    )
    assert result.exit_code == 2
    assert re.search(message, result.output.replace("\n", " "))
    assert "Traceback" not in result.output


def test_settings_check_their_engine(tmp_path):
    with pytest.raises(ValueError, match="engine must be one of"):
        training.train(TrainConfig(output=tmp_path, engine="hf"), CONFIG)


def test_doctor_says_what_is_usable_and_why_not():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "engine transformers: usable" in result.output
    assert "backend reference: usable" in result.output


def test_a_missing_or_foreign_sglang_is_said_in_one_sentence(monkeypatch):
    import importlib.util

    from mezo.engines.sglang import engine

    monkeypatch.setattr(engine, "version", lambda name: "0.5.9")
    if importlib.util.find_spec("sglang"):
        assert "must be 0.5.17 to 0.5.23, got 0.5.9" in available()["sglang"]
        monkeypatch.setattr(engine, "version", lambda name: "0.5.23.post1")
        assert available()["sglang"] is None
        monkeypatch.setattr(engine, "entry_points", lambda group: [])
        assert "does not see the mezo plugin" in available()["sglang"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "SGLang is not installed" in available()["sglang"]
    with pytest.raises(ImportError, match="launch_engine: SGLang is not installed; on a GPU host"):
        mezo.launch_engine("a model")
    assert "transformers is not installed" in available()["transformers"]
