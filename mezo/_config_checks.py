"""What the values of a `MeZOConfig` must be, and what to do about others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mezo._inputs import (
    as_list,
    checked_choice,
    checked_integer,
    checked_number,
    number,
    require,
    shown,
)

if TYPE_CHECKING:
    from mezo.config import TrainConfig

# Of each integer: the least, one past the greatest, and both in words.
INTEGERS = {
    "rank": (1, None, "an integer >= 1"),
    "seed": (0, 2**64, "an integer in [0, 2**64)"),
    "num_directions": (1, 2**24, "an integer in [1, 2**24)"),
}
NUMBERS = {
    "alpha": "a finite number > 0",
    "lr": "a finite number >= 0",
    "eps": "a finite number > 0",
    "clip": "None or a finite number > 0",
}
REMEDY = {
    "rank": "use 4 to 64",
    "seed": "use 0",
    "num_directions": "use 1 for plain MeZO",
    "alpha": "usual values are rank to 2 * rank",
    "lr": "1e-4 is the paper's value for LoRA",
    "eps": "the estimator divides by 2 * eps and 1e-2 is the paper's value for LoRA; to compare "
    "both signs at eps 0 call run.pair_losses(batch, eps=0.0)",
    "clip": "pass None for no bound",
}


_ALL_LINEAR = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj"


def text_remedy(value: Any) -> str | None:
    """What to do about a number that is a text; None for anything else."""
    if not isinstance(value, str):
        return None
    return "pass a number, not text (YAML reads 1e-3 as text and 1.0e-3 as a number)"


def module_names(names: Any) -> tuple[str, ...]:
    """Return ``names`` as a tuple of distinct non-empty strings, or raise ValueError."""
    listed = list(names) if isinstance(names, (set, frozenset)) else as_list(names)
    modules = listed or []
    is_shorthand = any(isinstance(n, str) and n == "all-linear" for n in (names, *modules))
    remedy = "use ['q_proj', 'v_proj']"
    if is_shorthand:
        remedy = f"name the modules that PEFT finds by itself, in many models {_ALL_LINEAR}"
    elif isinstance(names, str) and names.strip():
        parts = [part.strip() for part in names.split(",") if part.strip()]
        remedy = f"pass the list {parts}"
    require(
        bool(modules)
        and not is_shorthand
        and all(isinstance(name, str) and name for name in modules)
        and len(set(modules)) == len(modules),
        "MeZOConfig: target_modules must be a non-empty list of distinct module names, "
        f"got {shown(names)}; {remedy}.",
    )
    return tuple(str(name) for name in modules)


def invocation_of(value: Any, *, is_needed: bool) -> str | tuple[int, ...] | None:
    """Return an invocation as text, as a tuple of token ids or as None, or raise ValueError."""
    if value is None and not is_needed:
        return None
    if isinstance(value, str) and value:
        return str(value)
    ids = as_list(value) or []
    found = [number(i) for i in ids]
    require(
        bool(ids) and all(isinstance(i, int) and i >= 0 for i in found),
        "MeZOConfig: invocation must be a non-empty text or token ids (integers >= 0)"
        f"{' with prefix activated' if is_needed else ''}, got {shown(value)}; "
        "pass the words between prompt and answer, as ' The movie was'.",
    )
    return tuple(int(i) for i in found if i is not None)


_AT_LEAST_1 = (
    *("threads", "max_tokens_per_forward", "k_shot", "train_examples", "max_prompt_tokens"),
    *("max_length", "num_steps", "batch_size", "accumulation", "eval_examples", "eval_batch_size"),
    *("eval_every", "save_every", "save_total_limit", "patience", "logging_steps"),
    "max_skipped_steps",
)
_CHOICES = {
    "on_bad_row": ("stop", "skip"),
    "eval_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch", "best"),
}
TRACKERS = ("tensorboard", "wandb", "trackio")


def check_train(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of a `TrainConfig` as plain Python, or raise ValueError."""
    found: dict[str, Any] = {}
    for name in _AT_LEAST_1:
        if (value := getattr(config, name)) is not None:
            found[name] = checked_integer(
                f"train: {name}", value, 1, None, "an integer >= 1", "raise it, or leave it out"
            )
    found["warmup_steps"] = checked_integer(
        "train: warmup_steps", config.warmup_steps, 0, None, "an integer >= 0", "use 0 for none"
    )
    found["warmup_ratio"] = checked_number(
        "train: warmup_ratio", config.warmup_ratio, lambda x: 0 <= x <= 1, "in 0..1", "use 0.1"
    )
    require(
        not (config.warmup_steps and config.warmup_ratio),
        f"train: one of warmup_steps and warmup_ratio must be 0, got {config.warmup_steps} and "
        f"{config.warmup_ratio}; give one.",
    )
    if config.num_epochs is not None:
        found["num_epochs"] = checked_number(
            "train: num_epochs", config.num_epochs, lambda x: x > 0, "a number > 0", "use 3"
        )
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name)) is not None:
            found[name] = checked_choice(f"train: {name}", value, choices, f"use {choices[0]!r}")
    for strategy, steps, option in (
        ("eval_strategy", "eval_every", "eval_steps"),
        ("save_strategy", "save_every", "save_steps"),
    ):
        require(
            getattr(config, strategy) != "steps" or getattr(config, steps) is not None,
            f"train: {option} must be given with {strategy} 'steps', got none; give {option}.",
        )
        require(
            getattr(config, strategy) in (None, "steps") or getattr(config, steps) is None,
            f"train: {option} must come with {strategy} 'steps', got "
            f"{getattr(config, strategy)!r}; leave one of them out.",
        )
    require(
        config.save_strategy != "best" or evaluates(config),
        "train: save_strategy 'best' must come with evaluations during the training, got none; "
        "give eval_steps, or eval_strategy 'epoch'.",
    )
    for name in ("load_best", "patience"):
        require(
            not getattr(config, name) or evaluates(config),
            f"train: {name} must come with evaluations during the training, got none; give "
            "eval_steps, or eval_strategy 'epoch'.",
        )
    for name, option in (
        ("best_metric", "metric_for_best_model"),
        ("greater_is_better", "greater_is_better"),
    ):
        require(
            chooses(config) or getattr(config, name) is None,
            f"train: {option} must come with what chooses by it, got none; give "
            "load_best_model_at_end, early_stopping_patience or save_strategy 'best', or leave it "
            "out.",
        )
    require(
        config.push_to_hub or config.hub_model_id is None,
        f"train: hub_model_id must come with push_to_hub, got {shown(config.hub_model_id)}; "
        "give push_to_hub, or leave it out.",
    )
    trackers = _names(config.report_to)
    wrong = [name for name in trackers if name not in TRACKERS]
    require(
        not wrong,
        f"train: report_to must be among {TRACKERS} or 'none', got {wrong}; leave it out for none.",
    )
    found["report_to"] = trackers
    found["columns"] = column_names(config.columns)
    found["engine_args"] = engine_arguments(config.engine_args)
    require(
        config.template is None or isinstance(config.template, Mapping),
        f"train: template must be a block of names and texts, got {shown(config.template)}; see "
        "docs/data.md.",
    )
    _check_data(config)
    if config.at is not None:
        found["at"] = checked_integer("train: at", config.at, 0, None, "an integer >= 0", "use 0")
    require(
        config.at is None or config.resume_from_checkpoint not in (None, "auto"),
        f"train: at must come with resume_from_checkpoint, a run's directory, got "
        f"{shown(config.resume_from_checkpoint)}; name the run to go on from.",
    )
    require(
        config.resume_from_checkpoint is None or not config.overwrite_output_dir,
        "train: overwrite_output_dir must come without resume_from_checkpoint, got both; to begin "
        "anew, leave resume_from_checkpoint out.",
    )
    return found


# What a task says itself, and what a stream, whose length nobody knows, does not have.
_NOT_OF_TASKS = (
    *("dataset_config", "dataset_revision", "train_split", "test_split", "eval_data", "streaming"),
    *("columns", "template", "on_bad_row", "completion_only_loss", "assistant_only_loss"),
    "chat_template_path",
)
_NOT_OF_STREAMS = ("k_shot", "train_examples", "max_prompt_tokens")


def _check_data(config: TrainConfig) -> None:
    """Raise for settings that the data leaves without an effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in _NOT_OF_TASKS if getattr(config, name) != defaults[name]]
    require(
        config.task is None or not given,
        f"train: a task must come without {', '.join(given)}, got task {config.task!r}, which has "
        "data and a wording of its own; leave one of them out.",
    )
    given = [name for name in _NOT_OF_STREAMS if getattr(config, name) is not None]
    strategies = ("eval_strategy", "save_strategy")
    given += [f"{name} 'epoch'" for name in strategies if getattr(config, name) == "epoch"]
    given += ["num_train_epochs"] if config.num_epochs and not config.num_steps else []
    require(
        not config.streaming or not given,
        f"train: streaming must come without {', '.join(given)}, got both, and nobody knows the "
        "whole of a stream; leave streaming out, or the others.",
    )


def evaluates(config: TrainConfig) -> bool:
    """Whether there are evaluations between the first and the last step."""
    return config.eval_every is not None or config.eval_strategy == "epoch"


def chooses(config: TrainConfig) -> bool:
    """Whether the training chooses something by its evaluations."""
    return config.load_best or config.patience is not None or config.save_strategy == "best"


def _names(value: Any) -> tuple[str, ...]:
    """Names as a tuple; given as one text with commas, or as a list."""
    listed = value.split(",") if isinstance(value, str) else as_list(value) or []
    names = tuple(str(name).strip() for name in listed)
    return () if names == ("none",) else tuple(name for name in names if name)


# Arguments of engines that settings of ours already say.
_OURS = {
    "revision": "model_revision",
    "dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
    "max_prefill_tokens": "max_tokens_per_forward",
    "model_path": "model_name_or_path",
}


def engine_arguments(value: Any) -> dict[str, Any] | None:
    """{argument: value} of an engine.

    Raises:
        ValueError: something else, or an argument that is a setting.
    """
    if value is None:
        return None
    is_fine = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    found = dict(value) if is_fine else {}
    require(
        is_fine,
        f"train: engine_args must be names and values as {{'tp_size': 2}}, got {shown(value)}; use "
        "the names that the engine gives its arguments.",
    )
    for name, setting in _OURS.items():
        require(
            name not in found,
            f"train: engine_args must leave {name} to the setting {setting}, got "
            f"{shown(found.get(name))}; give {setting}.",
        )
    return found


def column_names(value: Any) -> dict[str, str] | None:
    """{our column: the data's}; given so, or as "ours=theirs,ours=theirs".

    Raises:
        ValueError: something else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        pairs = [part.split("=", 1) for part in value.split(",")]
        is_fine = all(len(pair) == 2 and all(part.strip() for part in pair) for pair in pairs)
        found = {pair[0].strip(): pair[1].strip() for pair in pairs} if is_fine else {}
    else:
        is_fine = isinstance(value, Mapping) and all(
            isinstance(x, str) and x for pair in value.items() for x in pair
        )
        found = dict(value) if is_fine else {}
    require(
        bool(found),
        f"train: columns must be pairs as prompt=question,completion=answer, got {shown(value)}; "
        "name the data's column behind each =.",
    )
    return found
