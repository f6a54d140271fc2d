"""Arguments that SGLang would refuse after its processes have started, refused before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mezo._inputs import checked_integer, checked_number, nearest, require, shown
from mezo.engines.sglang.cpu_host.host import has_sgl_kernel
from mezo.engines.sglang.eras import ERA
from mezo.engines.sglang.model_checkpoint import Checkpoint

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_KV_DTYPES = ("auto", "bf16", "bfloat16")
# What a CPU host runs; "mezo" is ours, around SGLang's choice. Triton's interpreter runs its own.
_ATTENTION = ("torch_native", "intel_amx", "flex_attention", "mezo")
_LORA = ("torch_native",)
_COUNTS = (
    "max_lora_rank",
    "max_loras_per_batch",
    "max_prefill_tokens",
    "max_running_requests",
    "max_total_tokens",
    "tp_size",
)


def check_args(args: Mapping[str, object]) -> None:
    """Raise ValueError for a name that SGLang's ServerArgs do not have."""
    from sglang.srt.server_args import ServerArgs

    names = ERA.argument_names(ServerArgs)
    for name in args:
        near = nearest(name, names)
        require(
            name in names,
            f"launch_engine: server_args must be arguments of sglang.Engine, got {name!r}; "
            f"{f'is {near!r} meant?' if near else 'see sglang.srt.server_args.ServerArgs'}",
        )


def plain_numbers(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with the numbers that are reckoned with here as Python's own.

    Raises:
        ValueError: one of them is no number, or out of range.
    """
    numbers: dict[str, float] = {}
    for name in _COUNTS:
        if args.get(name) is not None:
            what, remedy = f"launch_engine: {name}", "pass a positive number, or leave it out"
            numbers[name] = checked_integer(what, args[name], 1, None, "an integer >= 1", remedy)
    if args.get("mem_fraction_static") is not None:
        numbers["mem_fraction_static"] = checked_number(
            "launch_engine: mem_fraction_static",
            args["mem_fraction_static"],
            lambda x: 0 < x < 1,
            "a number between 0 and 1",
            "leave it out, and it follows from the model's size",
        )
    return {**args, **numbers}


def check_cpu_args(args: Mapping[str, Any], checkpoint: Checkpoint | None) -> None:
    """Raise for what SGLang has no code for on a CPU host, or would fail at when it starts.

    Raises:
        ValueError: a dtype that SGLang does not know, or tensor-parallel ranks that the heads
            cannot be divided among.
        NotImplementedError: quantisation or a dtype of the KV cache that needs SGLang's compiled
            kernels, an attention or LoRA backend that there is on GPUs only.
    """
    dtype = args.get("dtype")
    require(
        isinstance(dtype, str) and dtype in _DTYPES,
        f"launch_engine: dtype must be one of {_DTYPES}, got {shown(dtype)}; use 'float32' on "
        "CPU hosts.",
    )
    quantised = None if has_sgl_kernel() else args.get("quantization")
    if quantised is None and not has_sgl_kernel() and checkpoint is not None:
        found = checkpoint.config.get("quantization_config")
        quantised = found.get("quant_method", "some method") if isinstance(found, dict) else None
    backend = args.get("attention_backend")
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    attention = (*_ATTENTION, "triton") if is_interpreted else _ATTENTION
    lora = (*_LORA, "triton", "csgmv") if is_interpreted else _LORA
    for name, value, is_fine, remedy in (
        ("quantization", quantised, quantised is None, "use the model's unquantised weights"),
        (
            "kv_cache_dtype",
            args.get("kv_cache_dtype"),
            has_sgl_kernel() or args.get("kv_cache_dtype") in (None, *_KV_DTYPES),
            f"use one of {_KV_DTYPES}",
        ),
        (
            "attention_backend",
            backend,
            backend is None or backend in attention,
            f"use one of {attention}",
        ),
        (
            "lora_backend",
            args.get("lora_backend"),
            args.get("lora_backend") in (None, *lora),
            f"use one of {lora}",
        ),
    ):
        if not is_fine:
            raise NotImplementedError(
                f"launch_engine: {name} must be one that SGLang has on CPU hosts, got "
                f"{shown(value)}; {remedy}."
            )
    ranks = int(args.get("tp_size") or 1)
    heads = 0 if checkpoint is None else checkpoint.heads
    require(
        heads % ranks == 0,
        f"launch_engine: tp_size must divide the model's {heads} attention heads, got {ranks}; "
        "use 1 or a divisor.",
    )
