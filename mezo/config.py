"""`MezoConfig`: everything that, with the batches, determines a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

PREFIX_MODES = ("exact", "activated", "detached")
DISTRIBUTIONS = ("gaussian", "rademacher")


def require(is_ok: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``is_ok``."""
    if not is_ok:
        raise ValueError(message)


@dataclass(frozen=True)
class MezoConfig:
    """The adapter and the estimator of one run.

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
        ValueError: a value is out of range.
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
        object.__setattr__(self, "target_modules", _module_names(self.target_modules))
        require(
            isinstance(self.rank, int) and self.rank >= 1,
            f"MezoConfig: rank must be an integer >= 1, got {self.rank!r}; take 4 to 64.",
        )
        for field in ("alpha", "lr", "eps"):
            value = getattr(self, field)
            require(
                math.isfinite(value) and (value > 0 or (field == "lr" and value == 0)),
                f"MezoConfig: {field} must be a finite number > 0, got {value!r}; "
                f"{_REMEDY[field]}.",
            )
        require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**64,
            f"MezoConfig: seed must be an integer in [0, 2**64), got {self.seed!r}; take 0.",
        )
        require(
            isinstance(self.num_directions, int) and 1 <= self.num_directions < 2**24,
            "MezoConfig: num_directions must be an integer in [1, 2**24), "
            f"got {self.num_directions!r}; take 1 for plain MeZO.",
        )
        require(
            self.distribution in DISTRIBUTIONS,
            f"MezoConfig: distribution must be one of {DISTRIBUTIONS}, got {self.distribution!r}; "
            "take 'gaussian'.",
        )
        require(
            self.clip is None or (math.isfinite(self.clip) and self.clip > 0),
            f"MezoConfig: clip must be None or a finite number > 0, got {self.clip!r}; "
            "pass None to leave projected_grad alone.",
        )
        require(
            bool(self.name) and "/" not in self.name,
            f"MezoConfig: name must be a non-empty string without '/', got {self.name!r}; "
            "take 'mezo'.",
        )
        require(
            self.prefix in PREFIX_MODES,
            f"MezoConfig: prefix must be one of {PREFIX_MODES}, got {self.prefix!r}; take 'exact'.",
        )
        if isinstance(self.invocation, list):
            object.__setattr__(self, "invocation", tuple(self.invocation))
        require(
            bool(self.invocation) or (self.invocation is None and self.prefix != "activated"),
            "MezoConfig: invocation must be a non-empty text or token ids"
            f"{' with prefix activated' if self.prefix == 'activated' else ''}, got "
            f"{self.invocation!r}; pass the words between prompt and answer, as ' The movie was'.",
        )

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, ``alpha / rank``."""
        return self.alpha / self.rank


_REMEDY = {
    "alpha": "usual values are rank to 2 * rank",
    "lr": "1e-4 is the paper's value for LoRA",
    "eps": "the estimator divides by 2 * eps and 1e-2 is the paper's value for LoRA; to compare "
    "both signs at eps 0 call run.pair_losses(batch, eps=0.0)",
}


def _module_names(names: object) -> tuple[str, ...]:
    """Return ``names`` as a tuple of distinct non-empty strings, or raise ValueError."""
    modules = tuple(names) if isinstance(names, (list, tuple, set, frozenset)) else ()
    require(
        bool(modules)
        and all(isinstance(n, str) and n for n in modules)
        and len(set(modules)) == len(modules),
        "MezoConfig: target_modules must be a non-empty list of distinct module names, "
        f"got {names!r}; take ['q_proj', 'v_proj'].",
    )
    return modules
