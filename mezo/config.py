"""`MezoConfig`: everything that, with the batches, determines a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mezo._inputs import as_list, checked_choice, checked_integer, checked_number, number, shown
from mezo._inputs import require as require

PREFIX_MODES = ("exact", "activated", "detached")
DISTRIBUTIONS = ("gaussian", "rademacher")


@dataclass(frozen=True)
class MezoConfig:
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
        num_directions: directions per step (n of n-SPSA); each takes two adapter slots.
        distribution: "gaussian" or "rademacher".
        clip: bound on ``abs(projected_grad)``, or None.
        prefix: "exact" (ordinary LoRA), or "activated" (activated LoRA: the adapter acts from the
            invocation on, the prompt runs on the base model, and its KV is shared by both signs and
            all directions, options, steps and epochs), or "detached" (ordinary LoRA whose prompts
            run once a step under theta for both signs: an approximation that drops the prompt's
            part of the derivative; `mezo.prefix_bias` measures by how much).
        invocation: text or token ids between every prompt and its completion. Needed by
            "activated", where it begins the adapted part; elsewhere just the end of the prompt.
        name: the adapter's name in the engine; ``engine.generate(..., lora_path=name)`` serves it.

    Raises:
        ValueError: a value is of the wrong type (numbers as text, for example) or out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    lr: float = 1e-4
    eps: float = 1e-2
    seed: int = 0
    num_directions: int = 1
    distribution: str = "gaussian"
    clip: float | None = None
    prefix: str = "exact"
    invocation: str | tuple[int, ...] | None = None
    name: str = "mezo"

    def __post_init__(self) -> None:
        self._set("target_modules", _module_names(self.target_modules))
        for field, (low, high, expected) in _INTEGERS.items():
            value = getattr(self, field)
            what = f"MezoConfig: {field}"
            self._set(field, checked_integer(what, value, low, high, expected, _REMEDY[field]))
        for field, expected in _NUMBERS.items():
            value = getattr(self, field)
            if field == "clip" and value is None:
                continue
            may_be_0 = field == "lr"
            self._set(
                field,
                checked_number(
                    f"MezoConfig: {field}",
                    value,
                    lambda x, may_be_0=may_be_0: x > 0 or (may_be_0 and x == 0),  # type: ignore[misc]
                    expected,
                    _text_remedy(value) or _REMEDY[field],
                ),
            )
        for field, choices in (("distribution", DISTRIBUTIONS), ("prefix", PREFIX_MODES)):
            what, remedy = f"MezoConfig: {field}", f"take {choices[0]!r}"
            self._set(field, checked_choice(what, getattr(self, field), choices, remedy))
        require(
            isinstance(self.name, str) and bool(self.name) and "/" not in self.name,
            f"MezoConfig: name must be a non-empty string without '/', got {shown(self.name)}; "
            "take 'mezo'.",
        )
        self._set("name", str(self.name))
        self._set("invocation", _invocation(self.invocation, is_needed=self.prefix == "activated"))

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, ``alpha / rank``."""
        return self.alpha / self.rank


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
    "rank": "take 4 to 64",
    "seed": "take 0",
    "num_directions": "take 1 for plain MeZO",
    "alpha": "usual values are rank to 2 * rank",
    "lr": "1e-4 is the paper's value for LoRA",
    "eps": "the estimator divides by 2 * eps and 1e-2 is the paper's value for LoRA; to compare "
    "both signs at eps 0 call run.pair_losses(batch, eps=0.0)",
    "clip": "pass None to leave projected_grad alone",
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
    remedy = "take ['q_proj', 'v_proj']"
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
        "MezoConfig: target_modules must be a non-empty list of distinct module names, "
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
        "MezoConfig: invocation must be a non-empty text or token ids (integers >= 0)"
        f"{' with prefix activated' if is_needed else ''}, got {shown(value)}; "
        "pass the words between prompt and answer, as ' The movie was'.",
    )
    return tuple(int(i) for i in found if i is not None)
