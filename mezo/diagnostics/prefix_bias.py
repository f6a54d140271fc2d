"""How far `prefix="detached"` is from exact: its projected gradients against the exact ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezo._arguments import checked_batches
from mezo.results import StepStatus, raise_for

if TYPE_CHECKING:
    from mezo.data.batch import Batch
    from mezo.run import Run


@dataclass(frozen=True)
class PrefixBias:
    """Detached projected gradients d against exact ones e, same directions, same batches.

    Args:
        cosine: ``d . e / (|d| |e|)``.
        correlation: Pearson's; NaN for fewer than two or for equal values.
        relative_error: ``|d - e| / |e|``.
        detached: d, one value per direction.
        exact: e, likewise.
    """

    cosine: float
    correlation: float
    relative_error: float
    detached: tuple[float, ...]
    exact: tuple[float, ...]


def prefix_bias(run: Run, batches: Iterable[Batch]) -> PrefixBias:
    """Measure the error of detached projected gradients at the run's current weights.

    Each batch is scored twice along the same fresh directions, with its prompts detached and
    exactly. Directions are those of the run's next steps; no weight changes, and the run goes on
    with the step number it had.

    Args:
        run: a run with ``prefix="detached"``.
        batches: one per direction (and `num_directions` each); 20 or more tell something.

    Returns:
        The bias.

    Raises:
        ValueError: a run in another prefix mode, or no batch.
        NonfiniteLossError: a loss is not finite, so that there is nothing to compare.
        TypeError: ``run`` is no run, or ``batches`` no iterable of batches.
    """
    from mezo.run import checked_run

    checked_run("prefix_bias", run)
    checked_batches("prefix_bias: batches", batches)
    if run.config.prefix != "detached":
        raise ValueError(
            f"prefix_bias: run must have prefix 'detached', got {run.config.prefix!r}; "
            "attach one with MeZOConfig(prefix='detached')."
        )
    detached: list[float] = []
    exact: list[float] = []
    for offset, batch in enumerate(batches):
        encoded = run.encode(batch)
        for rows, grads in ((encoded, detached), (encoded.undivided(), exact)):
            result = run.measure(rows, offset=offset)
            if result.status is StepStatus.NONFINITE_LOSS:
                raise_for(result)
            grads += result.projected_grads
    if not exact:
        raise ValueError("prefix_bias: batches must hold at least one batch, got none; pass some.")
    return compare(detached, exact)


def compare(detached: Sequence[float], exact: Sequence[float]) -> PrefixBias:
    """Cosine, correlation and relative error of two lists of projected gradients."""
    norms = _norm(detached) * _norm(exact)
    centred = [
        [v - math.fsum(values) / len(values) for v in values] for values in (detached, exact)
    ]
    spread = _norm(centred[0]) * _norm(centred[1])
    difference = [d - e for d, e in zip(detached, exact, strict=True)]
    return PrefixBias(
        cosine=_dot(detached, exact) / norms if norms else math.nan,
        correlation=_dot(*centred) / spread if spread else math.nan,
        relative_error=_norm(difference) / _norm(exact) if _norm(exact) else math.nan,
        detached=tuple(detached),
        exact=tuple(exact),
    )


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(_dot(values, values))
