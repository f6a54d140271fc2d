"""Settings and values of Hugging Face's trainers that mezo says in another way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mezo._inputs import number

# Settings that have no place here, and what takes it.
ELSEWHERE = {
    "max_grad_norm": "clip bounds projected_grad; there is no gradient to clip",
    "bf16": "dtype names the model's dtype",
    "fp16": "dtype names the model's dtype",
    "gradient_checkpointing": "forward passes keep no activations; leave it out",
    "lora_dropout": "dropout would differ between the two signs; leave it out",
    "attn_implementation": "the engine chooses its attention; leave it out",
    "dataset_text_field": "columns: text=NAME names the column",
    "do_train": "mezo train trains and mezo eval evaluates; leave it out",
    "do_eval": "mezo train trains and mezo eval evaluates; leave it out",
    "warmup": "warmup_steps or warmup_ratio",
    "weight_decay": "an update moves along its directions only; leave it out",
    "data_seed": "seed is that of the directions and of the data order",
}
# What 0, False and none leave out, as all of our trainings do.
_LEFT_OUT = (
    *("max_grad_norm", "bf16", "fp16", "gradient_checkpointing", "lora_dropout", "warmup"),
    "weight_decay",
)
_NO = ("false", "no", "off", "none", "null")


def is_left_out(name: str, value: Any) -> bool:
    """Whether a setting of theirs has a value that asks for what happens anyway, as lora_dropout 0.

    Args:
        name: of the setting, with - or _.
        value: a number, a bool, None, or a text as on the command line.
    """
    if name.replace("-", "_") not in _LEFT_OUT:
        return False
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return value.lower() in _NO or _as_number(value) == 0
    return number(value) == 0


def translated(field: str, value: Any) -> Any:
    """Return a value as mezo says it, of those that they write otherwise.

    max_steps -1 is none, constant_with_warmup constant; what YAML reads for a bare ``no`` is "no".
    """
    if field == "num_steps" and not isinstance(value, bool) and _as_number(value) == -1:
        return None
    if field == "schedule" and value == "constant_with_warmup":
        return "constant"  # whose rate rises, too, where there are steps to warm up
    if field in ("eval_strategy", "save_strategy") and value is False:
        return "no"
    return value


# Counts of steps that may be a share of all steps, in (0, 1).
SHARES = ("eval_every", "save_every", "logging_steps", "warmup_steps")


def share_of(field: str, value: Any) -> float | None:
    """Return a count of steps that is a share of all of them; None for any other value."""
    found = _as_number(value) if field in SHARES and not isinstance(value, bool) else None
    return found if found is not None and 0 < found < 1 else None


def without_left_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that ask for what happens anyway, see `is_left_out`."""
    return {name: value for name, value in given.items() if not is_left_out(name, value)}


def _as_number(value: Any) -> float | None:
    """A number, also one in a text; None for anything else."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return number(value)
