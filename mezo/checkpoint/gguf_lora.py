"""An adapter as llama.cpp reads it: one GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mezo._inputs import require
from mezo.checkpoint.peft_fields import is_activated, scaling_of

# {Hugging Face class: (llama.cpp's name of the architecture, whether its rotary embedding pairs
# neighbours, so that the rows of q and k stand in another order than in the checkpoint)}
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Phi3ForCausalLM": ("phi3", False),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}


def write_gguf_lora(
    fields: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    base: str,
    output: Path,
    loading: Mapping[str, Any],
) -> Path:
    """Write an adapter file of llama.cpp, in fp32; `llama-server --lora` loads it.

    Args:
        fields: of adapter_config.json.
        weights: {canonical name: tensor}, lora_A and lora_B of each layer.
        base: directory or hub name of the base model, of which the config is read only.
        output: a file that ends with .gguf, or a directory, where adapter.gguf is written.
        loading: more arguments of ``from_pretrained``.

    Returns:
        The file.

    Raises:
        ImportError: `gguf` is not installed.
        ValueError: an activated adapter, or an architecture or a layer that is not known here.
        OSError: the base model's config cannot be read, or the file not be written.

    Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
    """
    require(
        not is_activated(fields),
        "export: an adapter for llama.cpp must be an ordinary one, got an activated one, which "
        "llama.cpp's server lets act from one token before the invocation on, where it was not "
        "trained to; use format 'peft' and serve it with SGLang or PEFT.",
    )
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "export: package gguf must be installed for the format 'gguf-lora', got none; run "
            "pip install 'gguf>=0.17'."
        ) from error
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, **loading)
    arch, is_permuted = _architecture_of(config)
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    path = output if output.suffix == ".gguf" else output / "adapter.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    writer = gguf.GGUFWriter(temporary, arch)
    try:
        _add_fields(writer, gguf, fields)
        for name, value in weights.items():
            layer, _, factor = name.rpartition(".")
            target = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
            require(
                target is not None and factor in ("lora_A", "lora_B"),
                f"export: {name} must be lora_A or lora_B of a layer that llama.cpp's {arch} has, "
                "got another one; use format 'peft', or 'merged'.",
            )
            values = value.float()
            if factor == "lora_B":
                values = _for_llama_cpp(values, layer, fields, config, is_permuted)
            writer.add_tensor(f"{target}.{factor.lower()}", values.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _architecture_of(config: Any) -> tuple[str, bool]:
    """The row of `ARCHITECTURES` for a checkpoint's config."""
    found = (getattr(config, "architectures", None) or ["none"])[0]
    require(
        found in ARCHITECTURES,
        f"export: format 'gguf-lora' must have a base model of one of {sorted(ARCHITECTURES)}, got "
        f"{found}; use format 'merged' and llama.cpp's convert_hf_to_gguf.py.",
    )
    return ARCHITECTURES[found]


def _add_fields(writer: Any, gguf: Any, fields: Mapping[str, Any]) -> None:
    """What llama.cpp reads beside the tensors."""
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(fields["lora_alpha"]))


def _for_llama_cpp(
    b: torch.Tensor, layer: str, fields: Mapping[str, Any], config: Any, is_permuted: bool
) -> torch.Tensor:
    """Return lora_B `[D_out, r]` in llama.cpp's order of rows and for its scaling, alpha / r."""
    scale = scaling_of(fields, layer) * b.shape[1] / fields["lora_alpha"]
    if scale != 1.0:
        b = b * scale
    kind = layer.rpartition(".")[2]
    if is_permuted and kind in ("q_proj", "k_proj"):
        count = config.num_attention_heads
        if kind == "k_proj":
            count = getattr(config, "num_key_value_heads", None) or count
        # Halves of a head [2, D/2] become pairs of neighbours [D/2, 2].
        b = b.view(count, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
    return b
