"""What the user's `compute_metrics` returns, as names and Python's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mezo._inputs import number, plain, require, shown


def as_numbers(compute_metrics: Callable[[Any], Any]) -> Callable[[Any], dict[str, float]]:
    """Return the function with its values as Python's numbers, as JSON takes them.

    NumPy's and torch's scalars become numbers, None becomes nothing, and "eval_f1" becomes "f1", as
    all names get "eval_" where Hugging Face has it.

    Raises:
        ValueError: when it is called, what it returns is neither None nor names and numbers.
    """

    def compute(prediction: Any) -> dict[str, float]:
        returned = compute_metrics(prediction)
        if returned is None:
            return {}
        is_names = isinstance(returned, Mapping)
        require(
            is_names,
            f"train: compute_metrics must return names and numbers, got {shown(returned)}; return "
            "a dict as {'f1': 0.5}.",
        )
        found = {}
        for name, value in returned.items():
            # A flag is a number for Hugging Face's trainers, too.
            single = plain(value)
            figure = int(single) if isinstance(single, bool) else number(single)
            require(
                figure is not None,
                f"train: compute_metrics must return names and numbers, got {shown(value)} for "
                f"{name!r}; return a float.",
            )
            assert figure is not None
            found[str(name).removeprefix("eval_")] = figure
        return found

    return compute
