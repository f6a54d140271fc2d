"""What PEFT's adapter_config.json can say, and what of it we reproduce: one table for all uses.

`FIELDS` lists every field of PEFT 0.21's LoraConfig, `TENSORS` every kind of tensor in its files.
The plugin checks adapters with them before SGLang loads them, `save_peft` reads its defaults from
them, and the tests write the tables of docs/adapters.md from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# How a field with another value than PEFT's default is treated.
HONOURED, REFUSED, IGNORED = "honoured", "refused", "ignored"


@dataclass(frozen=True)
class Field:
    """One field of adapter_config.json.

    Args:
        default: PEFT's default.
        verdict: HONOURED, REFUSED (other than its default) or IGNORED (it does not change answers).
        note: what is done, or why it is refused; for the docs.
        expected: the values that are accepted, in words; for error sentences.
        accepts: whether a value is accepted.
        activated: like ``accepts``, for activated adapters, where they differ; PEFT itself refuses
            to combine some fields with activated LoRA.
        remedy: for error sentences, if it is not the note.
    """

    default: Any
    verdict: str
    note: str
    expected: str = "anything"
    accepts: Callable[[Any], bool] = lambda value: True
    activated: Callable[[Any], bool] | None = None
    remedy: str = ""


def _is_off(value: Any) -> bool:
    """Whether a value says that something is not used."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _refused(default: Any, note: str, expected: str | None = None) -> Field:
    """A field that must have its default, or be off."""
    words = expected or ("false" if default is False else "null")
    return Field(default, REFUSED, note, words, lambda v: _is_off(v) or v == default)


def _honoured(default: Any, note: str, expected: str, accepts: Callable[[Any], bool]) -> Field:
    """A field whose every value that PEFT writes is honoured."""
    return Field(default, HONOURED, note, expected, accepts, remedy="save the adapter with PEFT")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_natural(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)


def _are_modules(value: Any) -> bool:
    """A regular expression or a list of names."""
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return _is_pattern(value)


def _are_modules_or_off(value: Any) -> bool:
    return value is None or _are_modules(value)


def _are_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return value is None or all(_is_natural(layer) for layer in layers)


def _are_patterns(value: Any, is_value: Callable[[Any], bool]) -> bool:
    """None, or a dict from regular expressions to values."""
    return value is None or (
        isinstance(value, dict) and all(_is_pattern(k) and is_value(v) for k, v in value.items())
    )


# Initial values that leave the base model's weights as they are.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
_OTHER_BASE = "it replaces the base model's weights; save it converted to plain LoRA"
_ONLY_INIT = "only read together with init_lora_weights"

FIELDS: dict[str, Field] = {
    "peft_type": Field(
        None,
        HONOURED,
        "LORA only; convert other methods (VBLORA, ADALORA, LOHA, ...) to plain LoRA with PEFT",
        '"LORA"',
        lambda v: v == "LORA",
    ),
    "r": _honoured(
        8,
        "as PEFT; at most the engine's max_lora_rank",
        "a positive whole number",
        lambda v: _is_natural(v, 1),
    ),
    "lora_alpha": _honoured(8, "as PEFT", "a number", _is_number),
    "use_rslora": _honoured(
        False,
        "scaling lora_alpha / sqrt(r)",
        "true or false",
        lambda v: v is None or isinstance(v, bool),
    ),
    "rank_pattern": _honoured(
        {},
        "ranks are padded with zeros to the largest one",
        "a dict from regular expressions to positive whole numbers",
        lambda v: _are_patterns(v, lambda rank: _is_natural(rank, 1)),
    ),
    "alpha_pattern": _honoured(
        {},
        "what differs from the commonest scaling is folded into lora_B",
        "a dict from regular expressions to numbers",
        lambda v: _are_patterns(v, _is_number),
    ),
    "target_modules": _honoured(
        None,
        "lists, regular expressions and all-linear: what is in the file counts, and a tensor that "
        "the field does not name is refused (PEFT would leave it out); not null, which PEFT never "
        "writes",
        "a list of names or a regular expression",
        _are_modules,
    ),
    "exclude_modules": _honoured(
        None,
        "as target_modules",
        "a list of names or a regular expression",
        _are_modules_or_off,
    ),
    "layers_to_transform": _honoured(None, "as target_modules", "layer numbers", _are_layers),
    "layers_pattern": _honoured(
        None, "as target_modules", "a list of names or a name", _are_modules_or_off
    ),
    "alora_invocation_tokens": _honoured(
        None,
        "makes it an activated adapter, which acts from their last occurrence in the prompt on",
        "a list of token ids",
        lambda v: v is None or (isinstance(v, list) and all(_is_natural(t) for t in v)),
    ),
    "init_lora_weights": Field(
        True,
        REFUSED,
        "pissa, olora, corda, loftq and lora_ga are refused, since files saved without conversion "
        "belong to a base model with other weights (save with "
        "path_initial_model_for_weight_conversion); true, false, gaussian, eva, orthogonal and "
        "(not activated) mica change nothing",
        "one of true, false, gaussian, eva, orthogonal, mica (not activated)",
        lambda v: isinstance(v, (bool, str, type(None))) and v in _PLAIN_INITS,
        activated=lambda v: isinstance(v, (bool, str, type(None))) and v in _PLAIN_INITS[:-1],
    ),
    "velora_config": Field(
        None,
        IGNORED,
        "changes the backward pass only; PEFT refuses it for activated adapters, and so do we",
        "null for an activated adapter",
        activated=_is_off,
    ),
    "bias": _refused("none", "trained biases of the base model cannot be per adapter", '"none"'),
    "lora_bias": _refused(False, "SGLang's LoRA has no bias; extract the adapter without one"),
    "modules_to_save": _refused(
        None, "whole modules cannot be per adapter; train without, or adapt them with LoRA"
    ),
    "trainable_token_indices": _refused(None, "rows of the embedding cannot be per adapter"),
    "ensure_weight_tying": _refused(False, "ties the adapters of embedding and lm_head"),
    "use_dora": _refused(False, "SGLang has no DoRA; convert it to plain LoRA with PEFT"),
    "use_qalora": _refused(False, "lora_A reads pooled inputs; merge it instead"),
    "use_bdlora": _refused(None, "factors are block-diagonal; convert it to plain LoRA with PEFT"),
    "kasa_config": _refused(None, _OTHER_BASE),
    "monteclora_config": _refused(None, "weights are sampled; convert it to plain LoRA with PEFT"),
    "arrow_config": _refused(None, "routes between several adapters"),
    "layer_replication": _refused(None, "the base model has more layers than the engine's"),
    "target_parameters": _refused(
        None, "parameters that are no linear layers (experts) are not adapted; use target_modules"
    ),
    "megatron_config": _refused(
        None, "names and shapes are Megatron's; export it for transformers"
    ),
    "task_type": Field(
        None,
        IGNORED,
        "null, CAUSAL_LM and FEATURE_EXTRACTION; other tasks come with a head of their own, and "
        "PEFT activates adapters of CAUSAL_LM only",
        "CAUSAL_LM (or null or FEATURE_EXTRACTION, if not activated)",
        lambda v: v in _TASKS,
        activated=lambda v: v == "CAUSAL_LM",
    ),
    "auto_mapping": Field(None, IGNORED, "a note"),
    "peft_version": Field(None, IGNORED, "a note"),
    "base_model_name_or_path": Field(
        None, IGNORED, "a note; whether it is the engine's model is for you to know"
    ),
    "revision": Field(None, IGNORED, "SGLang loads this revision from the hub"),
    "inference_mode": Field(False, IGNORED, "training only"),
    "lora_dropout": Field(0.0, IGNORED, "training only"),
    "fan_in_fan_out": Field(False, IGNORED, "of Conv1D layers; the file is the same"),
    "megatron_core": Field("megatron.core", IGNORED, "only read together with megatron_config"),
    "loftq_config": Field({}, IGNORED, _ONLY_INIT),
    "eva_config": Field(None, IGNORED, _ONLY_INIT),
    "corda_config": Field(None, IGNORED, _ONLY_INIT),
    "lora_ga_config": Field(None, IGNORED, _ONLY_INIT),
    "qalora_group_size": Field(16, IGNORED, "only read together with use_qalora"),
    "runtime_config": Field(None, IGNORED, "where PEFT computes; not saved by newer versions"),
}


@dataclass(frozen=True)
class TensorKind:
    """A kind of tensor in an adapter's file; the first kind whose pattern fits a name is it.

    Args:
        what: in words; for the docs and error sentences.
        pattern: regular expression of the whole name.
        verdict: HONOURED, REFUSED or IGNORED.
        note: what is done, or why it is refused.
    """

    what: str
    pattern: str
    verdict: str
    note: str


_PREFIX = r"base_model\.model\."
LINEAR = TensorKind(
    "lora_A and lora_B of a linear layer, lm_head among them",
    rf"{_PREFIX}(?P<path>.+)\.lora_(?P<factor>[AB])\.weight",
    HONOURED,
    "of layers that the engine's lora_target_modules has; missing neighbours of a fused projection "
    "(q, k, v; gate, up) are filled up with zeros",
)
EMBEDDING = TensorKind(
    "lora_embedding_A and lora_embedding_B",
    rf"{_PREFIX}(?P<path>.+)\.lora_embedding_(?P<factor>[AB])",
    HONOURED,
    "of embed_tokens; refused for activated adapters, as in PEFT",
)
COPY = TensorKind(
    "a saved copy of the embedding or lm_head",
    rf"{_PREFIX}(?P<path>(?:.+\.)?(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight",
    HONOURED,
    "PEFT puts it into the base model: left out where it equals the engine's, else refused",
)
TENSORS: tuple[TensorKind, ...] = (
    TensorKind(
        "lora_A and lora_B of an expert",
        rf"{_PREFIX}(?P<path>.+\.experts(\..+)?)\.lora_(?P<factor>[AB])\.weight",
        REFUSED,
        "nothing compares adapted experts with PEFT yet; set MEZO_CHECK_ADAPTERS=0 to leave "
        "ordinary adapters to SGLang",
    ),
    LINEAR,
    EMBEDDING,
    COPY,
    TensorKind("lora_velora_embed", r".+\.lora_velora_embed", IGNORED, "training only"),
    TensorKind(
        "lora_B.bias", r".+\.lora_B\.bias", REFUSED, "belongs to lora_bias; extract without it"
    ),
    TensorKind(
        "lora_magnitude_vector",
        r".+\.lora_magnitude_vector(\.weight)?",
        REFUSED,
        "belongs to use_dora; convert it to plain LoRA with PEFT",
    ),
    TensorKind(
        "trainable_tokens_delta",
        r".+\.trainable_tokens_delta",
        REFUSED,
        "belongs to trainable_token_indices",
    ),
    TensorKind("anything else", r".*", REFUSED, "no tensor of a PEFT LoRA adapter"),
)


def kind_of(name: str) -> tuple[TensorKind, re.Match[str]]:
    """Return the kind of a tensor, and the match of its pattern."""
    for kind in TENSORS:
        if match := re.fullmatch(kind.pattern, name):
            return kind, match
    raise AssertionError("the last pattern fits every name")


def is_activated(config: Mapping[str, Any]) -> bool:
    """Whether a config is an activated adapter's."""
    return bool(config.get("alora_invocation_tokens"))


def check_fields(config: Mapping[str, Any], name: str) -> None:
    """Raise unless every field of an adapter_config.json is one that we reproduce or may ignore.

    Args:
        config: the fields.
        name: the adapter's name, for the error.

    Raises:
        ValueError: a field, by name; a field that PEFT 0.21 does not have must be off.
    """
    activated = is_activated(config)
    for key in dict.fromkeys(("peft_type", "task_type", *config)):
        value, field = config.get(key), FIELDS.get(key)
        if field is None:
            if not _is_off(value):
                raise ValueError(
                    f"adapter {name!r}: {key} must be null or absent, since it is no field of PEFT "
                    f"0.21, got {short(value)}; load an adapter without it."
                )
            continue
        accepts = (activated and field.activated) or field.accepts
        if not accepts(value):
            raise ValueError(
                f"adapter {name!r}: {key} must be {field.expected}, got {short(value)}; "
                f"{field.remedy or field.note}."
            )


def short(value: Any) -> str:
    """Return a value for an error sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _matching(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that fits a module, as PEFT's get_pattern_key."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """Return the rank that PEFT gives to a module."""
    return int(_matching(config.get("rank_pattern"), path, config["r"]))


def scaling_of(config: Mapping[str, Any], path: str) -> float:
    """Return PEFT's scaling of a module's adapter."""
    alpha = _matching(config.get("alpha_pattern"), path, config["lora_alpha"])
    rank = rank_of(config, path)
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def field_against(config: Mapping[str, Any], path: str) -> str | None:
    """Return the field that keeps PEFT from adapting a module, or None.

    Source: PEFT `check_target_module_exists`.
    """
    targets: Any = config.get("target_modules")
    excluded: Any = config.get("exclude_modules")
    if excluded and _names(excluded, path):
        return "exclude_modules"
    if targets == "all-linear":
        return None
    if not _names(targets, path):
        return "target_modules"
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str) or path in targets:
        return None
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path):
            wanted = layers if isinstance(layers, list) else [layers]
            return None if int(match["idx"]) in wanted else "layers_to_transform"
    return "layers_pattern"


def _names(modules: list[str] | str, path: str) -> bool:
    """Whether a list of names or a regular expression means a module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in modules)
