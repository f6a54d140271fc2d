"""The adapter's tensors by name: initial values, assembly of shards, PEFT files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mezo.checkpoint.atomic import replace_file
from mezo.checkpoint.peft_fields import FIELDS
from mezo.config import MezoConfig
from mezo_kernels import TensorSpec, philox4x32

# DESIGN section 2 gives domains 0 to 2 of the Philox counter to directions; initial values are 3.
_INIT_DOMAIN = 3

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


def initial_values(spec: TensorSpec, seed: int) -> torch.Tensor:
    """Return theta_0 of one adapter tensor, or of a shard of one.

    lora_A is Kaiming-uniform as in PEFT, U(-1/sqrt(d_in), 1/sqrt(d_in)), with its random words from
    our own Philox counter (domain 3, step 0), so that a run is a function of its seed; lora_B is 0.

    Args:
        spec: the tensor; its name ends in `lora_A` ([r, d_in]) or `lora_B` ([d_out, r]).
        seed: the run's seed.

    Returns:
        fp32 tensor of ``spec.shape`` on the CPU, equal for a shard and for the slice of the whole.

    Numerics: 24-bit uniforms without 0 and the bounds, scaled in float64, rounded to fp32 once.
    Source: PEFT `LoraLayer.reset_lora_parameters`; He et al. 2015 (a = sqrt(5)).
    """
    rows, cols = spec.shape
    if spec.name.endswith("lora_B"):
        return torch.zeros(rows, cols, dtype=torch.float32)
    global_cols = (spec.global_shape or spec.shape)[1]
    row = torch.arange(spec.row0, spec.row0 + rows, dtype=torch.int64)[:, None]
    col = torch.arange(spec.col0, spec.col0 + cols, dtype=torch.int64)[None, :]
    element = (row * global_cols + col).reshape(-1)
    first, last = int(element[0]) >> 2, int(element[-1]) >> 2
    counter = torch.zeros(last - first + 1, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(first, last + 1)
    counter[:, 1] = spec.uid
    counter[:, 3] = _INIT_DOMAIN << 24
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32], dtype=torch.int64)
    words = philox4x32(counter, key).reshape(-1)[element - 4 * first]
    uniform = ((words >> 8).double() + 0.5) * 2.0**-23 - 1.0  # (-1, 1), exact
    return (uniform / math.sqrt(global_cols)).float().reshape(rows, cols)


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
    config: MezoConfig,
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
        f"base_model.model.{name}.weight": value.detach().cpu().contiguous()
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
    replace_file(target / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    text = json.dumps(fields, indent=2, sort_keys=True)
    replace_file(target / "adapter_config.json", f"{text}\n".encode())
    return target
