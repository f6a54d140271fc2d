"""What callers pass to a run, checked once: each of these returns it or raises one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mezo._inputs import as_list, checked_integer, checked_number, number, require, shown
from mezo.config import MeZOConfig
from mezo.core.state import is_safe
from mezo.data.batch import Batch, EncodedBatch


def checked_config(what: str, config: Any) -> MeZOConfig:
    """Return the config, or the default one for None; TypeError for anything else."""
    if config is None:
        return MeZOConfig()
    if not isinstance(config, MeZOConfig):
        raise TypeError(
            f"{what}: config must be a mezo.MeZOConfig, got {shown(config)}; "
            "pass mezo.MeZOConfig(rank=..., lr=...)."
        )
    return config


def checked_tokenizer(tokenizer: Any) -> None:
    """TypeError unless it is None or can be called as a Hugging Face tokenizer."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise TypeError(
            f"attach: tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}; "
            "pass transformers.AutoTokenizer.from_pretrained(model_path)."
        )


def checked_path(what: str, path: Any) -> Path:
    """Return a directory's path; ValueError for anything that is none."""
    is_path = isinstance(path, (str, os.PathLike)) and bool(os.fspath(path))
    require(is_path, f"{what} must be a path, got {shown(path)}; pass 'adapter/'.")
    return Path(path)


def checked_batches(what: str, batches: Any) -> Any:
    """Return an iterable of batches; TypeError for one batch, a text, a mapping or no iterable."""
    is_one = isinstance(batches, (str, bytes, Mapping, Batch, EncodedBatch))
    is_iterable = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if is_one or not is_iterable:
        raise TypeError(
            f"{what} must be an iterable of mezo.Batch, got {shown(batches)}; put batches into a "
            "list, or repeat one with itertools.repeat(batch)."
        )
    return batches


def check_trainer(
    batches: Any, held_out: Any, callbacks: Any, num_steps: Any, eval_every: Any
) -> None:
    """Raise for arguments of `MeZOTrainer` that are of the wrong type."""
    checked_batches("MeZOTrainer: batches", batches)
    checked_batches("MeZOTrainer: held_out", held_out)
    if not isinstance(callbacks, Sequence) or not all(
        callable(callback) or hasattr(callback, "on_step_end") for callback in callbacks
    ):
        raise TypeError(
            f"MeZOTrainer: callbacks must be a list of functions, got {shown(callbacks)}; "
            "put one into a list."
        )
    for name, value in (("num_steps", num_steps), ("eval_every", eval_every)):
        require(
            isinstance(number(value), int) or (name == "eval_every" and value is None),
            f"MeZOTrainer: {name} must be an integer, got {shown(value)}; pass a positive one.",
        )


def checked_lr(lr: Any) -> float:
    """A step's learning rate as a number, or ValueError."""
    remedy = "pass a number, not text" if isinstance(lr, str) else "pass None for config.lr"
    return checked_number("step: lr", lr, lambda x: x >= 0, "a finite number >= 0", remedy)


def checked_eps(eps: Any) -> float:
    """A perturbation scale that may be 0, or ValueError."""
    remedy = "pass 0 for the losses of theta, or None for config.eps"
    return checked_number("measure: eps", eps, lambda x: x >= 0, "a finite number >= 0", remedy)


def checked_offset(offset: Any, steps: int) -> int:
    """Steps from the next one, whose number must be one; or ValueError."""
    expected, remedy = f"an integer of at least {-steps}", "use 0 for the next step's directions"
    return checked_integer("measure: offset", offset, -steps, 2**32 - steps, expected, remedy)


def checked_coefficients(coefficients: Any, num_directions: int) -> list[float]:
    """A known step's coefficients: none, or a finite number for each direction; or ValueError."""
    values = as_list(coefficients)
    got = shown(coefficients) if values is None else len(values)
    require(
        values is not None and len(values) in (0, num_directions),
        "apply_update: coefficients must have one entry for each of the "
        f"{num_directions} directions, got {got}; pass StepResult.coefficients.",
    )
    remedy = "pass StepResult.coefficients, or an empty list for a skipped step"
    return [
        checked_number(f"apply_update: coefficients[{k}]", x, is_safe, _SAFE, remedy)
        for k, x in enumerate(values or ())
    ]


def checked_updates(updates: Any, num_directions: int) -> list[list[float]]:
    """Known steps' coefficients, see `checked_coefficients`."""
    require(
        isinstance(updates, Iterable) and not isinstance(updates, (str, Mapping)),
        f"apply_updates: coefficients must be a list for each step, got {shown(updates)}; pass "
        "StepResult.coefficients of each.",
    )
    return [checked_coefficients(values, num_directions) for values in updates]


_SAFE = "between -2^100 and 2^100"
