"""Adapters as PEFT writes them, one for every field of its config, and what they answer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as peft_config
from safetensors.torch import load_file, save_file

from tests.support.independent import load_peft, lora_parameters, row_logprobs
from tests.support.tiny import LINEARS, load_model

INVOCATION = [77, 8, 200]
PROMPT = [1, 40, 41, *INVOCATION, 42, 43, 44]
Edit = Callable[[dict[str, torch.Tensor]], None]


@dataclass(frozen=True)
class Case:
    """An adapter that uses one field.

    Args:
        lora: arguments of PEFT's LoraConfig, in place of the plain adapter's.
        fields: put into adapter_config.json afterwards.
        refused: the kinds of adapter that must be refused: "ordinary", "activated".
    """

    lora: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


BOTH = ("ordinary", "activated")
_ATTENTION = {"target_modules": ["q_proj", "v_proj", "o_proj"]}
_PATTERN = {r"layers\.0\.self_attn\.q_proj": 8, "down_proj": 1}


def _refused(**fields: Any) -> Case:
    return Case(fields=fields, refused=BOTH)


def _ignored(**fields: Any) -> Case:
    return Case(fields=fields)


# One or more adapters for every field; the names are those of the fields.
CASES: dict[str, list[Case]] = {
    "peft_type": [Case(), _refused(peft_type="VBLORA"), _refused(peft_type=None)],
    "r": [Case({"r": 8}), Case({"r": 1}), _refused(r=0), _refused(r="4"), _refused(r=True)],
    "lora_alpha": [Case({"lora_alpha": 3}), Case({"lora_alpha": 0}), _refused(lora_alpha="16")],
    "use_rslora": [Case({"use_rslora": True}), _refused(use_rslora="yes")],
    "rank_pattern": [
        Case({"rank_pattern": _PATTERN}),
        Case({"rank_pattern": _PATTERN, "use_rslora": True}),
        # Every module is named, and r itself is more than the engine has.
        Case({"rank_pattern": {"q_proj": 8, "v_proj": 2, "down_proj": 3}, "r": 64}),
        _refused(rank_pattern={"q_proj": 0}),
        _refused(rank_pattern={"(": 4}),
    ],
    "alpha_pattern": [
        Case({"alpha_pattern": _PATTERN}),
        Case({"alpha_pattern": {r"layers\.1\..*": 32}, "rank_pattern": _PATTERN}),
        Case({"alpha_pattern": {"q_proj": 5}, "lora_alpha": 0}),
        _refused(alpha_pattern={"q_proj": "big"}),
    ],
    "target_modules": [
        *(
            Case({"target_modules": modules})
            for modules in (
                ["q_proj"],
                ["k_proj"],
                ["v_proj"],
                ["q_proj", "k_proj"],
                ["k_proj", "v_proj"],
                ["gate_proj"],
                ["up_proj"],
                ["o_proj"],
                list(LINEARS),
                ["model.layers.1.self_attn.k_proj", "0.mlp.up_proj"],
                "all-linear",
                r".*\.1\..*(up|v)_proj",
            )
        ),
        Case(fields={"target_modules": r".*\.(q|v|down)_proj"}),
        _refused(target_modules=None),
        _refused(target_modules=7),
        _refused(target_modules="("),
    ],
    "exclude_modules": [
        Case({"exclude_modules": ["layers.0.self_attn.q_proj"]}),
        Case({"exclude_modules": r".*\.1\..*v_proj"}),
        _refused(exclude_modules=3),
    ],
    "layers_to_transform": [
        Case({"layers_to_transform": [1]}),
        Case({"layers_to_transform": 0}),
        _refused(layers_to_transform="0"),
    ],
    "layers_pattern": [
        Case({"layers_to_transform": [1], "layers_pattern": "layers"}),
        _refused(layers_pattern=3),
    ],
    "alora_invocation_tokens": [
        Case(),
        Case({"alora_invocation_tokens": [42]}),
        Case({"alora_invocation_tokens": [500, 501]}),  # not in the prompt: the base model
        _refused(alora_invocation_tokens="w42"),
        _refused(alora_invocation_tokens=[1.5]),
    ],
    "init_lora_weights": [
        Case({"init_lora_weights": False}),
        Case({"init_lora_weights": "gaussian"}),
        Case({"init_lora_weights": "orthogonal"}),
        Case({"init_lora_weights": "eva"}),
        Case({"init_lora_weights": "mica"}, refused=("activated",)),
        *(
            _refused(init_lora_weights=name)
            for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new")
        ),
    ],
    "velora_config": [
        Case({"velora_config": peft_config.VeloraConfig(num_groups=4)}, refused=("activated",))
    ],
    "bias": [_refused(bias="all"), _refused(bias="lora_only")],
    "lora_bias": [_refused(lora_bias=True)],
    "modules_to_save": [_refused(modules_to_save=["lm_head"])],
    "trainable_token_indices": [
        _refused(trainable_token_indices=[3, 4]),
        _refused(trainable_token_indices={"embed_tokens": [3]}),
    ],
    "ensure_weight_tying": [_refused(ensure_weight_tying=True)],
    "use_dora": [_refused(use_dora=True)],
    "use_qalora": [_refused(use_qalora=True)],
    "use_bdlora": [_refused(use_bdlora={"nblocks": 2})],
    "kasa_config": [_refused(kasa_config={"beta": 1e-4})],
    "monteclora_config": [_refused(monteclora_config={"num_samples": 2})],
    "arrow_config": [_refused(arrow_config={"top_k": 3})],
    "layer_replication": [_refused(layer_replication=[[0, 2], [1, 2]])],
    "target_parameters": [_refused(target_parameters=["mlp.experts.down_proj"])],
    "megatron_config": [_refused(megatron_config={"hidden_size": 64})],
    "task_type": [
        Case(),
        Case(fields={"task_type": None}, refused=("activated",)),
        Case(fields={"task_type": "FEATURE_EXTRACTION"}, refused=("activated",)),
        _refused(task_type="SEQ_CLS"),
    ],
    "auto_mapping": [_ignored(auto_mapping={"base_model_class": "X", "unsloth_fixed": True})],
    "peft_version": [_ignored(peft_version="9.9.9")],
    "base_model_name_or_path": [_ignored(base_model_name_or_path="no/such-model")],
    "revision": [_ignored(revision="v2")],
    "inference_mode": [_ignored(inference_mode=False)],
    "lora_dropout": [Case({"lora_dropout": 0.5})],
    "fan_in_fan_out": [_ignored(fan_in_fan_out=True)],
    "megatron_core": [_ignored(megatron_core="some.core")],
    "loftq_config": [_ignored(loftq_config={"loftq_bits": 4, "loftq_iter": 1})],
    "eva_config": [_ignored(eva_config={"rho": 2.0})],
    "corda_config": [_ignored(corda_config={"corda_method": "kpm"})],
    "lora_ga_config": [_ignored(lora_ga_config={"direction": "ArB2r"})],
    "qalora_group_size": [_ignored(qalora_group_size=8)],
    "runtime_config": [_ignored(runtime_config={"ephemeral_gpu_offload": True})],
}


def write(
    model_dir: str,
    target: Path,
    kind: str,
    case: Case,
    *,
    edit: Edit | None = None,
    seed: int = 0,
    **save: Any,
) -> Path:
    """Save a PEFT adapter with random weights.

    Args:
        model_dir: the base model.
        target: where to.
        kind: "ordinary" or "activated".
        case: its config.
        edit: changes the tensors of the file.
        seed: of the weights.
        save: arguments of `save_pretrained`.
    """
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    tokens = INVOCATION if kind == "activated" else None
    arguments = {**plain, "alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM", **case.lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(model_dir), LoraConfig(**arguments))
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora_parameters(model).values():
            parameter.data.normal_(0, 0.1, generator=generator)
        model.save_pretrained(str(target), **save)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **case.fields}))
    if edit is not None:
        file = target / "adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


@torch.no_grad()
def peft_logprobs(model_dir: str, directory: Path, row: list[int], prompt_len: int) -> torch.Tensor:
    """PEFT's log-likelihoods of the tokens behind a prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_peft(model_dir, directory)
    return row_logprobs(model, row, prompt_len)


@torch.no_grad()
def base_logprobs(model_dir: str, row: list[int], prompt_len: int) -> torch.Tensor:
    """The base model's."""
    return row_logprobs(load_model(model_dir), row, prompt_len)


def serve(engine: Any, name: str | None) -> tuple[list[int], torch.Tensor]:
    """Tokens that an engine generates behind PROMPT, and their log-likelihoods."""
    (output,) = engine.generate(
        input_ids=[PROMPT],
        lora_path=[name],
        sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
        return_logprob=True,
    )
    pairs = output["meta_info"]["output_token_logprobs"]
    return output["output_ids"], torch.tensor([pair[0] for pair in pairs])
