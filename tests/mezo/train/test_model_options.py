"""Which model is loaded, and how: names, revisions, code of its own, threads."""

from __future__ import annotations

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
import transformers
from typer.testing import CliRunner

from mezo.cli import app
from mezo.engines import transformers as engine
from tests.support.files import valid_json

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def verb(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def hub(tiny_model_dir, tmp_path, monkeypatch):
    """The name of a model in a hub cache of its own, with two revisions."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit, (revision, architecture) in enumerate((("main", "llama"), ("old", "mistral"))):
        snapshot = repository / "snapshots" / (str(commit) * 40)
        shutil.copytree(tiny_model_dir(architecture), snapshot)
        (repository / "refs" / revision).write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/tiny"


@pytest.fixture
def loaded(monkeypatch):
    """The class of each model that the engine loads, and torch's threads then."""
    seen, real = [], engine.TransformersEngine.open

    def note(self, handle, config, tokenizer):
        seen.append((type(handle).__name__, torch.get_num_threads()))
        return real(self, handle, config, tokenizer)

    monkeypatch.setattr(engine.TransformersEngine, "open", note)
    return seen


def test_a_model_by_its_name_or_directory(trained, hub, tiny_model_dir, loaded):
    for model in (hub, tiny_model_dir("mistral")):
        summary, _, _ = trained(model_name_or_path=model)
        assert summary["model_path"] == model
    assert [name for name, _ in loaded] == ["LlamaForCausalLM", "MistralForCausalLM"]


def test_a_revision_is_the_one_that_every_verb_loads(
    trained, hub, loaded, tiny_model_dir, tmp_path
):
    _, _, output = trained(model_name_or_path=hub, model_revision="old")
    merged = tmp_path / "merged"
    assert verb("eval", output, "--max_eval_samples", 2)[0] == 0
    assert verb("generate", output, "--prompt", "w5", "--max_new_tokens", 1)[0] == 0
    assert verb("export", output, "--format", "merged", "--output", merged)[0] == 0
    assert [name for name, _ in loaded] == ["MistralForCausalLM"] * 3
    assert json.loads((merged / "config.json").read_text())["model_type"] == "mistral"
    # A model that is named has no such revision.
    code, said = verb("eval", output, "--model", tiny_model_dir("mistral"), "--max_eval_samples", 2)
    assert code == 0, said


def test_a_revision_that_is_not_there_is_one_sentence(options, hub):
    words = [w for k, v in {**options, "model_name_or_path": hub}.items() for w in (f"--{k}", v)]
    code, said = verb("train", *words, "--model_revision", "new")
    assert code == 2
    assert "model: 'someone/tiny' must be a directory or hub name with a tokenizer, got" in said


@pytest.fixture
def own_code(tiny_model_dir, tmp_path, monkeypatch):
    """A model whose directory has the code of its class."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    directory = tmp_path / "own_model"
    shutil.copytree(tiny_model_dir("llama"), directory)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(OWN)
    return str(directory)


def test_a_model_s_own_code_runs_only_where_it_is_trusted(trained, options, own_code, loaded):
    words = {**options, "model_name_or_path": own_code}.items()
    code, said = verb("train", *(w for k, v in words for w in (f"--{k}", v)))
    assert code == 2
    assert f"model must be one that transformers can load, got '{own_code}' (The repository" in said
    assert said.endswith("pass trust_remote_code if you trust it.")
    assert loaded == []
    _, _, output = trained(model_name_or_path=own_code, trust_remote_code=True)
    assert verb("eval", output, "--max_eval_samples", 2)[0] == 0
    assert [name for name, _ in loaded] == ["OwnForCausalLM"] * 2
    assert verb("export", output, "--format", "merged", "--output", output / "merged")[0] == 0


def test_a_dtype_is_that_of_the_evaluation_afterwards(trained):
    summary, _, output = trained(dtype="bfloat16", eps=0.1)
    assert verb("eval", output)[0] == 0
    found = valid_json((output / "eval_results.json").read_text())["adapter"]
    assert found["loss"] == summary["held_out"]["after"]["cross_entropy"]


@pytest.mark.parametrize("name", ["train", "eval", "generate"])
def test_threads_are_those_of_the_engine(name, trained, loaded):
    before = torch.get_num_threads()
    _, _, output = trained(threads=before + 2 if name == "train" else None)
    if name == "eval":
        assert verb("eval", output, "--threads", before + 2, "--max_eval_samples", 2)[0] == 0
    elif name == "generate":
        words = ("--threads", before + 2, "--max_new_tokens", 1)
        assert verb("generate", output, "--prompt", "w5", *words)[0] == 0
    assert loaded[-1][1] == before + 2
    assert torch.get_num_threads() == before
