"""Losses from log-likelihoods. To add one, write its module and a row here."""

from __future__ import annotations

from mezo._inputs import require
from mezo._registry import Registry
from mezo.objectives.base import Objective, Targets
from mezo.objectives.classification import Classification
from mezo.objectives.completion import Completion

OBJECTIVES: Registry[Objective] = Registry(
    "objective", {"completion": Completion(), "classification": Classification()}
)

__all__ = ["OBJECTIVES", "Objective", "Targets", "name_for", "of"]


def name_for(name: str | None, *, has_options: bool) -> str:
    """Return the name of a batch's objective, which for None follows from the batch.

    Raises:
        ValueError: an unknown name, or an objective for the other kind of batch.
    """
    if name is None:
        return "classification" if has_options else "completion"
    needs_options = OBJECTIVES[name].needs_options
    require(
        needs_options == has_options,
        f"Batch: objective {name!r} must come with {_KINDS[needs_options]}, got "
        f"{_KINDS[has_options]}; pass these, or leave the objective out.",
    )
    return name


_KINDS = {False: "completions", True: "options and labels"}


def of(targets: Targets) -> Objective:
    """Return the objective of a batch.

    Raises:
        ValueError: a name that is unknown in this process.
    """
    require(
        targets.objective is None or targets.objective in OBJECTIVES,
        f"step: objective must be known in every process that scores, got {targets.objective!r}, "
        f"which this one does not have beside {list(OBJECTIVES)}; register it where SGLang's "
        "processes do so too: at the top level of the main script's module, not under its "
        "`if __name__`.",
    )
    return OBJECTIVES[name_for(targets.objective, has_options=targets.num_options is not None)]
