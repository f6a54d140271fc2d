"""Every setting of a training, with its default and its range: `MeZOConfig` and `TrainConfig`.

The command line reads them here. A task's preset may put another default in the place of one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mezo._inputs import (
    as_list,
    checked_choice,
    checked_integer,
    checked_number,
    number,
    require,
    shown,
)
from mezo.optim import ESTIMATORS, OPTIMIZERS
from mezo.optim.schedule import SCHEDULES

PREFIX_MODES = ("exact", "activated", "detached")
DISTRIBUTIONS = ("gaussian", "rademacher")
T = TypeVar("T")


def _option(default: T, text: str, name: str | None = None) -> T:
    """A field that is an option of `mezo train` too: with its help, and its name if it has another.

    ``T`` is what the field holds: the class gets the default.
    """
    return dataclasses.field(default=default, metadata={"help": text, "option": name})


@dataclass(frozen=True)
class MeZOConfig:
    """The adapter and the estimator of one run; every value is stored as plain Python.

    Numbers may be NumPy scalars and 0-d tensors, lists may be tuples, arrays and tensors.

    Args:
        rank: LoRA rank r, the same for every module.
        alpha: LoRA alpha; the adapter's output is scaled by ``alpha / rank``.
        target_modules: module names as PEFT writes them (`q_proj` ... `down_proj`).
        lr: learning rate; the update of one direction is ``-lr * projected_grad * z``. It may be
            overridden step by step (`mezo.step(run, batch, lr=...)`).
        eps: perturbation scale, > 0.
        seed: 64-bit seed of every z and of lora_A's initial values.
        num_directions: directions per step (n of n-SPSA); each needs two adapter slots.
        distribution: "gaussian" or "rademacher".
        clip: bound on ``abs(projected_grad)``, or None.
        prefix: "exact" (ordinary LoRA), or "activated" (activated LoRA: the adapter acts from the
            invocation on, the prompt runs on the base model, and its KV is shared by both signs and
            all directions, options, steps and epochs), or "detached" (ordinary LoRA whose prompts
            run once per step under theta for both signs: an approximation that drops the prompt's
            part of the derivative; `mezo.prefix_bias` measures by how much).
        invocation: text or token ids between every prompt and its completion. Needed by
            "activated", where it begins the adapted part; elsewhere just the end of the prompt.
        name: the adapter's name in the engine; ``engine.generate(..., lora_path=name)`` serves it.
        estimator: how losses become projected gradients (see `mezo.optim`).
        optimizer: how projected gradients become an update (see `mezo.optim`).

    Raises:
        ValueError: a value is of the wrong type (numbers as text, for example) or out of range.
    """

    rank: int = _option(8, "LoRA rank.")
    alpha: float = _option(16.0, "LoRA alpha.")
    target_modules: tuple[str, ...] = _option(("q_proj", "v_proj"), "Comma-separated module names.")
    lr: float = _option(1e-4, "Learning rate of the first step.")
    eps: float = _option(1e-2, "Perturbation scale.")
    seed: int = _option(0, "Seed of the directions and of the data order.")
    num_directions: int = _option(1, "Directions per step.")
    distribution: str = "gaussian"
    clip: float | None = _option(None, "Bound on abs(projected_grad).")
    prefix: str = _option("exact", "exact, activated or detached (approximate).")
    invocation: str | tuple[int, ...] | None = None
    name: str = "mezo"
    estimator: str = "two_sided"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        self._set("target_modules", _module_names(self.target_modules))
        for field, (low, high, expected) in _INTEGERS.items():
            value = getattr(self, field)
            what = f"MeZOConfig: {field}"
            self._set(field, checked_integer(what, value, low, high, expected, _REMEDY[field]))
        for field, expected in _NUMBERS.items():
            value = getattr(self, field)
            if field == "clip" and value is None:
                continue
            may_be_0 = field == "lr"
            self._set(
                field,
                checked_number(
                    f"MeZOConfig: {field}",
                    value,
                    lambda x, may_be_0=may_be_0: x > 0 or (may_be_0 and x == 0),  # type: ignore[misc]
                    expected,
                    _text_remedy(value) or _REMEDY[field],
                ),
            )
        for field, choices in (("distribution", DISTRIBUTIONS), ("prefix", PREFIX_MODES)):
            what, remedy = f"MeZOConfig: {field}", f"use {choices[0]!r}"
            self._set(field, checked_choice(what, getattr(self, field), choices, remedy))
        require(
            isinstance(self.name, str) and bool(self.name) and "/" not in self.name,
            f"MeZOConfig: name must be a non-empty string without '/', got {shown(self.name)}; "
            "use 'mezo'.",
        )
        self._set("name", str(self.name))
        ESTIMATORS.check(self.estimator, "MeZOConfig: ")
        OPTIMIZERS.check(self.optimizer, "MeZOConfig: ")
        self._set("invocation", _invocation(self.invocation, is_needed=self.prefix == "activated"))

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, ``alpha / rank``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TrainConfig:
    """A training on a task: its data, its length, its evaluations, its engine and its output.

    Args:
        output: directory for adapter/, summary.json, steps.jsonl and loss.png.
        task: name of the task (see `mezo.tasks`).
        engine: name of the engine (see `mezo.engines`).
        model: directory or name of the model; None: SmolLM2-135M-Instruct from the cache.
        data: file with the task's data; None: the cache's.
        num_steps: steps to take.
        batch_size: examples per step.
        schedule: learning rate: "constant", "linear" (to 0) or "cosine" (to 0).
        train_examples: examples to train on, the first of the split; None: all of them. With prefix
            "activated" a set whose prompts fit into the engine's cache is computed only once.
        max_prompt_tokens: training examples with longer prompts are left out; None keeps all.
        eval_examples: held-out examples (of any length) to evaluate on.
        eval_every: steps between evaluations, or None for before and after only.
        threads: CPU hosts: threads of the engine; None: see `mezo.launch_engine`.

    Raises:
        ValueError: an unknown schedule, or a number below 1.
    """

    output: Path = dataclasses.field(
        metadata={"help": "Directory for adapter, summary, log and plot.", "option": None}
    )
    task: str = _option("rotten_tomatoes", "Task to train on.")
    engine: str = _option("sglang", "sglang or transformers.")
    model: str | None = _option(None, "Model; default SmolLM2-135M-Instruct.")
    data: Path | None = _option(None, "Data file; default the task's own.")  # noqa: RUF009
    num_steps: int = _option(1000, "Steps to take.", "steps")
    batch_size: int = _option(16, "Examples per step.")
    schedule: str = _option("constant", "constant, linear or cosine.")
    train_examples: int | None = _option(None, "Training examples; default all of them.")
    max_prompt_tokens: int | None = _option(
        None, "Leave out training examples with longer prompts."
    )
    eval_examples: int = _option(200, "Held-out examples.")
    eval_every: int | None = _option(
        None, "Steps between evaluations; default before and after only."
    )
    threads: int | None = _option(
        None, "CPU hosts: engine threads; default OMP_NUM_THREADS, else 1."
    )

    def __post_init__(self) -> None:
        SCHEDULES.check(self.schedule, "train: ")
        for name in ("num_steps", "batch_size", "train_examples", "eval_examples", "threads"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"train: {name} must be at least 1, got {value}; raise it.",
            )


# Of each integer: the least, one past the greatest, and both in words.
_INTEGERS = {
    "rank": (1, None, "an integer >= 1"),
    "seed": (0, 2**64, "an integer in [0, 2**64)"),
    "num_directions": (1, 2**24, "an integer in [1, 2**24)"),
}
_NUMBERS = {
    "alpha": "a finite number > 0",
    "lr": "a finite number >= 0",
    "eps": "a finite number > 0",
    "clip": "None or a finite number > 0",
}
_REMEDY = {
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


def _text_remedy(value: Any) -> str | None:
    """What to do about a number that is a text; None for anything else."""
    if not isinstance(value, str):
        return None
    return "pass a number, not text (YAML reads 1e-3 as text and 1.0e-3 as a number)"


def _module_names(names: Any) -> tuple[str, ...]:
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


def _invocation(value: Any, *, is_needed: bool) -> str | tuple[int, ...] | None:
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
