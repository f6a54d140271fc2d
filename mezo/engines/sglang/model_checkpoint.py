"""What a checkpoint says about its size: config.json and the weights' headers, nothing loaded.

Names of models on the hub are looked up in the local cache; one that is not there yet has no size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from mezo._inputs import require, shown

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ITEM_BYTES = {"float32": 4, "float": 4, "float64": 8}  # of a config's dtype; others have 2
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of a safetensors header
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Tensor(TypedDict):
    """What a safetensors header says of a tensor."""

    dtype: str
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's sizes.

    Args:
        config: config.json, the language model's part of it on top.
        float_elements: elements of its weights that are floating point.
        other_bytes: bytes of its other weights, quantised ones.
    """

    config: Mapping[str, object]
    float_elements: int
    other_bytes: int

    def weight_bytes(self, item_bytes: int) -> int:
        """Bytes of the loaded weights, floating-point ones with ``item_bytes`` each."""
        return self.float_elements * item_bytes + self.other_bytes

    def kv_token_bytes(self, item_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        if self._get("kv_lora_rank"):  # latent attention keeps one vector for all heads
            width = self._get("kv_lora_rank") + self._get("qk_rope_head_dim")
        else:
            width = 2 * self._kv_heads * self._head_dim
        return self._layers * width * item_bytes

    def adapter_elements(self, rank: int, modules: Sequence[str]) -> int:
        """Elements of one LoRA adapter in SGLang's pool, which holds whole q|k|v and gate|up."""
        hidden = self._get("hidden_size", "n_embd", "d_model")
        inner = self._get("intermediate_size", "ffn_dim") or 4 * hidden
        queries, keys = self._heads * self._head_dim, self._kv_heads * self._head_dim
        sides = {
            "q_proj": hidden + queries,
            "k_proj": hidden + keys,
            "v_proj": hidden + keys,
            "o_proj": queries + hidden,
        }
        sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
        if "all" in modules:  # SGLang's word
            modules = tuple(sides)
        sides |= dict.fromkeys(("fc1", "fc2"), hidden + inner)
        whole = {
            name
            for module in modules
            for name in next((group for group in _GROUPS if module in group), (module,))
        }
        return self._layers * rank * sum(sides.get(name, 2 * hidden) for name in whole)

    @property
    def max_row_tokens(self) -> int | None:
        """Longest row that the model takes, or None where the config does not say."""
        return self._get("max_position_embeddings", "n_positions") or None

    @property
    def heads(self) -> int:
        """Attention heads, 0 where the config does not say."""
        return self._heads

    @property
    def _layers(self) -> int:
        return self._get("num_hidden_layers", "n_layer")

    @property
    def _heads(self) -> int:
        return self._get("num_attention_heads", "n_head")

    @property
    def _kv_heads(self) -> int:
        return self._get("num_key_value_heads") or self._heads

    @property
    def _head_dim(self) -> int:
        hidden = self._get("hidden_size", "n_embd", "d_model")
        return self._get("head_dim") or hidden // max(self._heads, 1)

    def _get(self, *names: str) -> int:
        """The first of these numbers that the config has, or 0."""
        values = (self.config.get(name) for name in names)
        return next((value for value in values if isinstance(value, int)), 0)


def read_checkpoint(
    model_path: str | os.PathLike[str], revision: str | None = None
) -> Checkpoint | None:
    """Read a checkpoint's sizes.

    Args:
        model_path: a directory, or a model's name on the hub.
        revision: of a model on the hub.

    Returns:
        The sizes; None for what SGLang finds by other means: a file, a URL, a model that is not
        here yet.

    Raises:
        ValueError: no such directory, or one that holds no model, with the reason.
    """
    is_path = isinstance(model_path, (str, os.PathLike)) and bool(os.fspath(model_path))
    require(
        is_path,
        "launch_engine: model_path must be the path or the hub name of a model, got "
        f"{shown(model_path)}; pass a text, as 'HuggingFaceTB/SmolLM2-135M-Instruct'.",
    )
    path = Path(model_path)
    if "://" in str(model_path) or path.is_file() or "SGLANG_USE_MODELSCOPE" in os.environ:
        return None
    if not path.is_dir():
        found = _cached(str(model_path), revision)
        if found is None:
            return None
        path = found
    config = _read_config(path)
    text = config.get("text_config")  # of a model that takes images, too
    merged = {**config, **(text if isinstance(text, dict) else {})}
    return Checkpoint(merged, *_weights(path, merged))


def _cached(name: str, revision: str | None) -> Path | None:
    """Where the hub's cache has a model; None where it has to be fetched first."""
    from huggingface_hub import constants, try_to_load_from_cache

    require(
        _HUB_NAME.fullmatch(name) is not None,
        f"launch_engine: model_path must be a directory with a model, got {name!r}, which does not "
        "exist; check the path.",
    )
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(found, str):
        return Path(found).parent
    require(
        not constants.HF_HUB_OFFLINE,
        f"launch_engine: model_path must be a directory or in the hub's cache, got {name!r}, which "
        "is neither, and HF_HUB_OFFLINE=1; check the name or fetch the model first.",
    )
    return None


def _read_config(path: Path) -> dict[str, object]:
    """The content of config.json."""
    file = path / "config.json"
    if not file.is_file():
        has_adapter = (path / "adapter_config.json").is_file()
        raise ValueError(
            f"launch_engine: model_path must hold a config.json, got the directory {str(path)!r} "
            f"{'with an adapter' if has_adapter else 'without'}; pass the directory of the "
            f"{'base model' if has_adapter else 'checkpoint'}."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # broken JSON, other encodings
        raise ValueError(
            f"launch_engine: {str(file)!r} must be JSON, got {type(error).__name__} ({error}); "
            "fetch the model again."
        ) from error
    is_model = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    require(
        is_model,
        f"launch_engine: {str(file)!r} must describe a model, got no model_type and no "
        "architectures; fetch the model again.",
    )
    return dict(config)


def _weights(path: Path, config: Mapping[str, object]) -> tuple[int, int]:
    """Floating-point elements of a checkpoint, and bytes of the rest."""
    index = path / "model.safetensors.index.json"
    names = set(_json(index).get("weight_map", {}).values()) or {"model.safetensors"}
    files = [path / name for name in sorted(names) if (path / name).is_file()]
    if len(files) < len(names):
        files = [] if index.is_file() else sorted(path.glob("*.safetensors"))
    headers = [_header(file) for file in files]
    if headers and all(header is not None for header in headers):
        elements = other = 0
        for entry in (e for header in headers for e in (header or {}).values()):
            nbytes = entry["data_offsets"][1] - entry["data_offsets"][0]
            if entry["dtype"] in _FLOATS:
                elements += nbytes // _FLOATS[entry["dtype"]]
            else:
                other += nbytes
        return elements, other
    # No headers: the sizes that an index or the files give, all of it in the config's dtype.
    indices = (index, path / "pytorch_model.bin.index.json")
    sizes = (_json(i).get("metadata", {}).get("total_size", 0) for i in indices)
    nbytes = int(next((size for size in sizes if size), 0))
    nbytes = nbytes or sum(file.stat().st_size for file in path.glob("*.bin"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return nbytes // _ITEM_BYTES.get(dtype, 2), 0


def _json(file: Path) -> dict[str, Any]:
    """A JSON file's content, or nothing where there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _header(file: Path) -> dict[str, _Tensor] | None:
    """The tensors that a safetensors file names; None for what is not one."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            return None
        try:
            header = json.loads(stream.read(size))
        except ValueError:
            return None
    if not isinstance(header, dict):
        return None
    header.pop("__metadata__", None)
    return header
