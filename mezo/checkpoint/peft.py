"""The adapter's tensors by name: assembly of shards, PEFT files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mezo._inputs import require
from mezo.checkpoint.atomic import replace_file
from mezo.checkpoint.peft_fields import FIELDS
from mezo.config import MeZOConfig
from mezo_kernels import TensorSpec

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX, _SUFFIX = "base_model.model.", ".weight"

# The fields that every reader of PEFT's files knows; those of newer versions are left out.
_WRITTEN = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "fan_in_fan_out",
    "bias",
    "init_lora_weights",
)


def assemble(
    shards: Iterable[tuple[TensorSpec, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Put shards of adapter tensors together, checking that replicated parts agree bitwise.

    Args:
        shards: (spec, fp32 values) of all ranks; a part may be there several times.

    Returns:
        {canonical name: fp32 tensor of the global shape}.

    Raises:
        RuntimeError: two ranks hold different values of one part, or a part is missing.
    """
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for spec, values in shards:
        shape = spec.global_shape or spec.shape
        if spec.name not in whole:
            whole[spec.name] = torch.zeros(shape, dtype=torch.float32)
            seen[spec.name] = torch.zeros(shape, dtype=torch.bool)
        region = (
            slice(spec.row0, spec.row0 + spec.shape[0]),
            slice(spec.col0, spec.col0 + spec.shape[1]),
        )
        known = seen[spec.name][region]
        bits, new = whole[spec.name][region].view(torch.int32), values.cpu().view(torch.int32)
        if not torch.equal(bits[known], new[known]):
            raise RuntimeError(
                f"assemble: every rank must hold the same bits of {spec.name}, got different ones "
                f"in rows {spec.row0}..{spec.row0 + spec.shape[0] - 1}; "
                "the ranks have diverged: replay the run from its coefficients."
            )
        whole[spec.name][region] = values.cpu()
        seen[spec.name][region] = True
    missing = sorted(name for name, mask in seen.items() if not bool(mask.all()))
    if missing:
        raise RuntimeError(
            f"assemble: every element must come from some rank, got none for parts of {missing}; "
            "gather the shards of all tensor-parallel ranks."
        )
    return whole


def save_peft(
    weights: Mapping[str, torch.Tensor],
    config: MeZOConfig,
    directory: str | Path,
    *,
    base_model: str | None = None,
    alora_invocation_tokens: Sequence[int] | None = None,
    partners: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write a PEFT adapter: adapter_config.json and adapter_model.safetensors. PEFT is not needed.

    Args:
        weights: {canonical name: fp32 tensor}, names as `model.layers.0.self_attn.q_proj.lora_A`.
        config: rank, alpha and target modules.
        directory: where to; made if needed. Files are replaced one at a time, each atomically and
            on the disk before its name is.
        base_model: name or path of the base model, recorded in the config.
        alora_invocation_tokens: makes it an activated LoRA that acts from these tokens on.
        partners: {canonical name: shape} of tensors to be written as zeros. SGLang stacks q, k, v
            and gate, up of a layer and loads all of a stack or none of it.

    Returns:
        The directory.

    Raises:
        OSError: the directory or its files cannot be written.
    """
    from safetensors.torch import save

    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    zeros = {name: torch.zeros(*shape) for name, shape in (partners or {}).items()}
    tensors = {
        f"{_PREFIX}{name}{_SUFFIX}": value.detach().cpu().contiguous()
        for name, value in {**zeros, **weights}.items()
    }
    fields = {name: FIELDS[name].default for name in _WRITTEN} | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": sorted({*config.target_modules, *(n.split(".")[-2] for n in zeros)}),
        "inference_mode": True,
    }
    if alora_invocation_tokens:  # older versions of PEFT do not know the field
        fields["alora_invocation_tokens"] = list(alora_invocation_tokens)
    replace_file(target / ADAPTER_FILES[1], save(tensors, metadata={"format": "pt"}))
    text = json.dumps(fields, indent=2, sort_keys=True)
    replace_file(target / ADAPTER_FILES[0], f"{text}\n".encode())
    return target


def read_peft(directory: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a PEFT adapter. PEFT is not needed.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.

    Returns:
        The fields of the config, and {canonical name: tensor} in the file's dtypes.

    Raises:
        ValueError: a file is missing or cannot be read, or a tensor's name is not PEFT's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = [Path(directory) / name for name in ADAPTER_FILES]
    for path in paths:
        require(
            path.is_file(),
            f"adapter: {path} must be a file, got none; pass the directory that a training has "
            "written.",
        )
    try:
        fields = json.loads(paths[0].read_text(encoding="utf-8"))
        tensors = load_file(paths[1])
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"adapter: the files in {directory} must be whole, got {error}; copy them again, or "
            "save the run again."
        ) from error
    wrong = [n for n in tensors if not (n.startswith(_PREFIX) and n.endswith(_SUFFIX))]
    require(
        not wrong,
        f"adapter: tensors in {paths[1]} must be called {_PREFIX}...{_SUFFIX}, as in PEFT's files, "
        f"got {wrong[:2]}; save the adapter with PEFT.",
    )
    return fields, {n[len(_PREFIX) : -len(_SUFFIX)]: value for n, value in tensors.items()}
