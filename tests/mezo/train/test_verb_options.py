"""Options of `mezo eval | generate | export` and what they change."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import contextmanager

import pytest
import transformers
from typer.testing import CliRunner

from mezo.cli import app
from mezo.data.example import Example
from mezo.engines import ENGINES
from mezo.engines.transformers import TransformersEngine
from mezo.run import Run
from mezo.train import evaluation
from tests.support.files import write_jsonl

TEXTS = [{"prompt": f"w{5 + i} w{6 + i}", "completion": f" w{9 + i} w8"} for i in range(40)]


@pytest.fixture
def run_dir(trained, tmp_path):
    """A run that was trained on a folder with the splits train, test and dev."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, count in (("train", 40), ("test", 7), ("dev", 3)):
        write_jsonl(folder / f"{name}.jsonl", TEXTS[:count])
    return trained(dataset_name=folder, max_steps=2)[2]


@pytest.fixture
def launched():
    """Registers an engine of the name "noted"; notes the models that it is started with."""
    models = []

    class Noted(TransformersEngine):
        @contextmanager
        def launch(self, model, config, **options):
            models.append(model)
            with super().launch(model, config, **options) as handle:
                yield handle

    ENGINES.register("noted", Noted())
    yield models
    ENGINES.unregister("noted")


def verb(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_which_examples_are_scored(run_dir, tmp_path):
    assert "(7 examples)" in verb("eval", run_dir)
    assert "(2 examples)" in verb("eval", run_dir, "--max_eval_samples", 2)
    data = ("--data", tmp_path / "folder")
    assert "(7 examples)" in verb("eval", run_dir, *data)
    assert "(3 examples)" in verb("eval", run_dir, *data, "--split", "dev")


def test_few_examples_are_taken_at_random():
    made = [Example(f"w{i}", options=("a", "b"), label=i // 50) for i in range(100)]
    few = evaluation._few(made, 20)
    assert len(few) == 20
    assert 4 < sum(example.label for example in few) < 16
    assert few == evaluation._few(made, 20) == sorted(few, key=made.index)
    assert evaluation._few(made, 100) is evaluation._few(made, None) is made
    grouped = [dataclasses.replace(example, group="q") for example in made]
    assert evaluation._few(grouped, 20) == grouped[:20]


def test_a_split_that_nothing_has_is_refused(run_dir, tmp_path):
    one = ("--data", tmp_path / "folder" / "dev.jsonl")
    for more, said in (
        ((), "split must be one of data, got 'none' and no data"),
        (one, "split must come with data that has several, got 'none' for data that is one"),
        (("--data", tmp_path / "folder"), "must have a file for split 'none'"),
    ):
        words = [str(word) for word in ("eval", run_dir, "--split", "none", *more)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())


def test_how_long_generated_completions_are(run_dir, monkeypatch):
    lengths, real = [], Run.generate

    def generate(run, prompts, **options):
        answers = real(run, prompts, **options)
        lengths.append(max(len(answer.split()) for answer in answers))
        return answers

    monkeypatch.setattr(Run, "generate", generate)
    words = ("eval", run_dir, "--metric", "exact_match")
    verb(*words)
    verb(*words, "--max_new_tokens", 1)
    assert lengths == [4, 4, 1, 1]  # twice the longest right answer; base and adapter
    monkeypatch.undo()
    said = [verb("generate", run_dir, "--prompt", "w5", "--max_new_tokens", n) for n in (1, 5)]
    assert [len(text.split()) for text in said] == [1, 5]


@pytest.mark.parametrize("name", ["eval", "generate"])
def test_another_engine_and_another_place_of_the_model(
    name, run_dir, launched, tiny_model_dir, tmp_path
):
    words = [name, run_dir, *(("--prompt", "w5") if name == "generate" else ())]
    verb(*words)
    assert launched == []
    same = verb(*words, "--engine", "noted")
    moved = shutil.copytree(tiny_model_dir("llama"), tmp_path / "moved")
    assert verb(*words, "--engine", "noted", "--model", moved) == same
    assert launched == [tiny_model_dir("llama"), str(moved)]


def test_an_export_s_format_and_model(run_dir, tiny_model_dir, tmp_path):
    words = ("export", run_dir, "--output")
    verb(*words, tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    verb(*words, tmp_path / "gguf", "--format", "gguf-lora")
    assert (tmp_path / "gguf" / "adapter.gguf").is_file()
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model_dir("llama"), dtype="bfloat16"
    )
    half.save_pretrained(tmp_path / "half")
    shutil.copy(f"{tiny_model_dir('llama')}/tokenizer.json", tmp_path / "half")
    shutil.copy(f"{tiny_model_dir('llama')}/tokenizer_config.json", tmp_path / "half")
    found = []
    for more in ((), ("--model", tmp_path / "half")):
        verb(*words, tmp_path / "merged", "--format", "merged", *more)
        config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
        found.append(str(config.dtype))
    assert found == ["torch.float32", "torch.bfloat16"]
