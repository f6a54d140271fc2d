"""Which form of the attention a scoring batch takes: the fastest one measured at shapes like its.

`python -m bench.paired` measures every form on a GPU and writes "points" of it; a copy of its file
as `attention_points/<device>.json` beside this module is what is looked up here. On a GPU without
such a file, and on the CPU, `shared_prefix_attention` takes every batch.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mezo_kernels import SharedPrefixPlan, shared_prefix_attention

# Overrides the choice: a form's name, or "engine" for no sharing.
ENVIRONMENT_VARIABLE = "MEZO_ATTENTION_FORM"
ENGINE = "engine"
DEFAULT = "triton"
FORMS: dict[str, Callable[..., Any]] = {DEFAULT: shared_prefix_attention}
# SGLang's backends that keep a row's bits as they do, by their names in the points.
_MEASURED_AS = {"triton": "sglang_triton"}
_POINTS = Path(__file__).parent / "attention_points"

Point = Mapping[str, Any]  # prefix, suffix, rows, gqa, head_dim, us: {form: microseconds}


def form_of(
    plan: SharedPrefixPlan, *, device: torch.device, gqa: int, head_dim: int, engines_own: str
) -> str:
    """Name the form for a batch.

    Args:
        plan: the batch.
        device: where it runs.
        gqa: heads per KV head.
        head_dim: D.
        engines_own: name of the engine's attention backend.

    Returns:
        A key of `FORMS`, or `ENGINE` where the engine's own attention is measured to be faster.
    """
    named = named_form()
    if named is not None:
        return named
    points = points_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else ()
    if not points:
        return DEFAULT
    unshared = _MEASURED_AS.get(engines_own, "")
    best = fastest(plan, points, (*FORMS, unshared), gqa=gqa, head_dim=head_dim)
    return ENGINE if best == unshared else best


def named_form() -> str | None:
    """The form that the environment asks for, or None.

    Raises:
        ValueError: there is no such form.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named and named not in (*FORMS, ENGINE):
        raise ValueError(
            f"attach: {ENVIRONMENT_VARIABLE} must be one of {[*FORMS, ENGINE]}, got {named!r}; "
            "unset it to have the form chosen."
        )
    return named or None


def check_named_form(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise where the environment asks for a form that cannot run on a layer's caches.

    Raises:
        ValueError: there is no such form, or it cannot run here.
    """
    named = named_form()
    if named is None or named == ENGINE:
        return
    k, v = k_cache[:0], v_cache[:0]
    try:
        # Of no tokens: what a step's call would check is checked, nothing is computed.
        FORMS[named](k, k, v, k, v, plan=SharedPrefixPlan([0], [0], [0], []), scale=1.0)
    except RuntimeError as error:
        raise ValueError(
            f"attach: {ENVIRONMENT_VARIABLE} must name a form that runs in this engine, got "
            f"{named!r} ({str(error).rstrip('.')}); unset it to have the form chosen."
        ) from error


def fastest(
    plan: SharedPrefixPlan,
    points: Sequence[Point],
    candidates: Collection[str],
    *,
    gqa: int,
    head_dim: int,
) -> str:
    """The candidate with the least time, summed over the nearest points of groups that share."""
    totals = dict.fromkeys((DEFAULT, *candidates), 0.0)  # the default wins a tie
    for group in range(plan.num_groups):
        rows = plan.group_rows(group)
        prefix = plan.kv_indptr[group + 1] - plan.kv_indptr[group]
        if not prefix:
            continue
        shape = {
            "prefix": prefix,
            "suffix": max((len(plan.row_tokens(row)) for row in rows), default=0),
            "rows": len(rows),
            "gqa": gqa,
            "head_dim": head_dim,
        }
        nearest = min(points, key=lambda point: _distance(point, shape))
        for form in totals:
            totals[form] += nearest["us"].get(form, math.inf)
    return min(totals, key=lambda form: totals[form])


def _distance(point: Point, shape: Mapping[str, int]) -> float:
    """Doublings between a point and a shape, over all of its sizes."""
    return sum(abs(math.log2((1 + point[key]) / (1 + size))) for key, size in shape.items())


@functools.cache
def points_of(device_name: str) -> tuple[Point, ...]:
    """What was measured on a device; nothing for one that was not."""
    path = _POINTS / f"{device_name.lower().replace(' ', '-')}.json"
    if not path.exists():
        return ()
    return tuple(json.loads(path.read_text())["points"])
