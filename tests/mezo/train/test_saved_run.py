"""A saved run in an engine again: the same bits, and a sentence for what is not a run."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import pytest
import torch
from typer.testing import CliRunner

import mezo
from mezo.checkpoint.records import write_json
from mezo.cli import app
from mezo.train.saved_run import open_run, read_prompts
from tests.support.tiny import load_model, make_tokenizer, random_batch

CONFIG = mezo.MeZOConfig(
    rank=4, alpha=8, target_modules=("v_proj", "up_proj"), seed=3, invocation=" w77 w8", name="mine"
)
BATCH = random_batch(random.Random(1), size=7, kind="classification")
PROMPTS = ["w20 w31 w42", "w9"]


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    """A function that trains in an engine: (directory, weights, last evaluation, continuations)."""

    def save(prefix="exact", handle=None, engine="transformers"):
        config = dataclasses.replace(CONFIG, prefix=prefix)
        model = handle or load_model(tiny_model_dir("llama"))
        tokenizer = None if handle else make_tokenizer()
        with mezo.attach(model, config, tokenizer=tokenizer, selftest=False) as run:
            rng = random.Random(prefix)
            for _ in range(5):
                run.step(random_batch(rng), lr=0.1)
            run.save(tmp_path / "run" / "adapter")
            summary = {"config": dataclasses.asdict(config), "engine": engine}
            write_json(tmp_path / "run" / "summary.json", summary)
            made = run.generate(PROMPTS, max_new_tokens=6)
            return tmp_path / "run", run.weights(), run.evaluate(BATCH), made

    return save


def check_same(run, weights, scores, made):
    ours = run.weights()
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], value) for name, value in weights.items())
    again = run.evaluate(BATCH)
    assert (again.loss, again.predictions) == (scores.loss, scores.predictions)
    assert again.loss != run.evaluate(BATCH, base=True).loss
    assert run.generate(PROMPTS, max_new_tokens=6) == made


@pytest.mark.parametrize("prefix", ["exact", "activated"])
def test_a_run_opened_again_gives_the_same_bits(saved, prefix):
    directory, *expected = saved(prefix)
    with open_run(directory) as run:
        assert run.config == dataclasses.replace(CONFIG, prefix=prefix)
        check_same(run, *expected)


@pytest.mark.sglang
@pytest.mark.proof
def test_a_run_of_sglang_opened_again_gives_the_same_bits(saved, tiny_model_dir, no_engine_noise):
    config = dataclasses.replace(CONFIG, prefix="activated")
    engine = mezo.launch_engine(tiny_model_dir("llama"), config)
    try:
        directory, *expected = saved("activated", engine, "sglang")
    finally:
        engine.shutdown()
    with open_run(directory) as run:
        assert run.session.engine_name == "sglang"
        check_same(run, *expected)


def test_another_engine_and_model_may_be_named(saved, tiny_model_dir, tmp_path):
    directory, *_ = saved()
    with pytest.raises(ValueError, match=r"engine must be one of.*got 'vllm'"):
        open_run(directory, engine="vllm").__enter__()
    moved = shutil.copytree(tiny_model_dir("llama"), tmp_path / "moved")
    with open_run(directory, model=moved) as run:
        assert run.session.model_path == str(moved)


def test_what_is_no_run_is_named(saved, tmp_path):
    def refused(sentence, directory):
        with pytest.raises(ValueError, match=sentence):
            open_run(directory).__enter__()

    refused(r"summary\.json must be a file, got none; pass the output", tmp_path)
    directory, *_ = saved()
    path = directory / "summary.json"
    text = path.read_text()
    path.write_text(text[:-5])
    refused(r"summary\.json must be JSON, got", directory)
    path.write_text("[]")
    refused(r"must have the run's settings under 'config', got none", directory)
    summary = json.loads(text)
    path.write_text(json.dumps({**summary, "config": {**summary["config"], "momentum": 1}}))
    refused(r"must be fields of MeZOConfig, got \['momentum'\]; use the mezo-sglang", directory)
    path.write_text(json.dumps({**summary, "config": {**summary["config"], "rank": 2}}))
    refused(r"set_weights: .* of shape \(2, 64\), got the shape \(4, 64\)", directory)


def test_prompts_are_the_lines_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("w5 w6\n\n  \nw7\n")
    assert read_prompts(path) == ["w5 w6", "w7"]
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"prompts\.txt must have a prompt on a line, got none"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"must be a text file in UTF-8, got UnicodeDecodeError"):
        read_prompts(path)


def generate(*arguments):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_verb_prints_answers(saved, tmp_path):
    directory, _, _, made = saved()
    some = ("--max_new_tokens", 6)
    assert generate(directory, "--prompt", PROMPTS[0], *some) == (0, f"{made[0]}\n")
    (tmp_path / "p.txt").write_text(PROMPTS[1])
    both = "".join(f"> {p}\n{text}\n" for p, text in zip(PROMPTS, made, strict=True))
    several = ("--prompt", PROMPTS[0], "--file", tmp_path / "p.txt", "--max-new-tokens", 6)
    assert generate(directory, *several) == (0, both)
    with open_run(directory) as run:
        base = run.generate(PROMPTS[:1], max_new_tokens=6, base=True)[0]
    assert base != made[0]
    assert generate(directory, "--prompt", PROMPTS[0], "--base", *some) == (0, f"{base}\n")
    stop = made[0].split()[2]
    cut = made[0][: made[0].index(stop)]
    assert generate(directory, "--prompt", PROMPTS[0], "--stop", stop, *some) == (0, f"{cut}\n")
    warm = ("--prompt", PROMPTS[0], "--temperature", 5.0, *some)
    assert generate(directory, *warm)[1] != generate(directory, *warm)[1]


def test_the_verbs_say_what_is_wrong(saved, tmp_path):
    directory, *_ = saved()
    code, text = generate(directory)
    assert (code, text) == (
        2,
        "error: generate: there must be a prompt, got none; give --prompt or --file.\n",
    )
    assert generate(tmp_path / "no", "--prompt", "w5")[0] == 2
    assert generate(directory, "--prompt", "w5", "--engine", "vllm")[0] == 2
    arguments = ["export", str(directory), "--output", str(tmp_path / "copy")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "copy" / "adapter_config.json").is_file()
    assert CliRunner().invoke(app, [*arguments, "--format", "onnx"]).exit_code == 2
    (tmp_path / "file").write_text("")
    arguments[-1] = str(tmp_path / "file" / "x")
    assert CliRunner().invoke(app, [*arguments, "--format", "gguf-lora"]).exit_code == 1
