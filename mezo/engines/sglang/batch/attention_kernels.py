"""Which attention kernel a scoring batch uses: the fastest one measured at shapes like its own.

`python -m bench.paired` measures every kernel on a GPU and writes "points" of it; a copy of its
file as `attention_points/<device>.json` beside this module is what is looked up here. On a GPU
without such a file, and on the CPU, every batch uses `shared_prefix_attention`.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import torch

from mezo.engines.sglang.batch.two_pass import composed_attention
from mezo_kernels import SharedPrefixPlan, shared_prefix_attention


class Kernel(Protocol):
    """Attention of a batch's queries to their prefixes and to their own sequences."""

    def __call__(
        self,
        q: torch.Tensor,
        k_suffix: torch.Tensor,
        v_suffix: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        plan: SharedPrefixPlan,
        scale: float,
        soft_cap: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`[T, H, D]` queries -> `[T, H, D_v]`, and no log-sum-exp unless it is asked for."""
        ...


# Overrides the choice: a kernel's name, or "engine" for no sharing.
ENVIRONMENT_VARIABLE = "MEZO_ATTENTION_KERNEL"
ENGINE = "engine"
DEFAULT = "triton"
KERNELS: dict[str, Kernel] = {
    DEFAULT: shared_prefix_attention,
    "composed": composed_attention,
    "flashinfer": functools.partial(shared_prefix_attention, backend="flashinfer"),
}
# FlashInfer splits prefixes by the whole batch, so that a row's bits depend on its company: only
# where it is asked for.
_AUTOMATIC = (DEFAULT, "composed")
# SGLang's backends that keep a row's bits as they do, by their names in the points.
_MEASURED_AS = {"triton": "sglang_triton"}
_POINTS = Path(__file__).parent / "attention_points"


class Shape(TypedDict):
    """Sizes of a group of rows that share a prefix."""

    prefix: int
    suffix: int
    rows: int
    gqa: int
    head_dim: int


class Point(Shape):
    """What was measured at a shape: microseconds of each kernel."""

    us: dict[str, float]


def choose(
    plan: SharedPrefixPlan, *, device: torch.device, gqa: int, head_dim: int, engines_own: str
) -> str:
    """Name the kernel for a batch.

    Args:
        plan: the batch.
        device: where it runs.
        gqa: heads per KV head.
        head_dim: D.
        engines_own: name of the engine's attention backend.

    Returns:
        A key of `KERNELS`, or `ENGINE` where the engine's own attention is measured to be faster.
    """
    chosen = named()
    if chosen is not None:
        return chosen
    points = points_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else ()
    if not points:
        return DEFAULT
    unshared = _MEASURED_AS.get(engines_own, "")
    best = fastest(plan, points, (*_AUTOMATIC, unshared), gqa=gqa, head_dim=head_dim)
    return ENGINE if best == unshared else best


def named() -> str | None:
    """The kernel that the environment asks for, or None.

    Raises:
        ValueError: there is no such kernel.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name and name not in (*KERNELS, ENGINE):
        raise ValueError(
            f"attach: {ENVIRONMENT_VARIABLE} must be one of {[*KERNELS, ENGINE]}, got {name!r}; "
            "unset it to have the kernel chosen."
        )
    return name or None


def check_named(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise where the environment asks for a kernel that cannot run on a layer's caches.

    Raises:
        ValueError: there is no such kernel, or it cannot run here.
    """
    chosen = named()
    if chosen is None or chosen == ENGINE:
        return
    k, v = k_cache[:0], v_cache[:0]
    try:
        # A call without tokens makes the checks of a step's call and computes nothing.
        KERNELS[chosen](k, k, v, k, v, plan=SharedPrefixPlan([0], [0], [0], []), scale=1.0)
    except RuntimeError as error:
        raise ValueError(
            f"attach: {ENVIRONMENT_VARIABLE} must name a kernel that runs in this engine, got "
            f"{chosen!r} ({str(error).rstrip('.')}); unset it to have the kernel chosen."
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
        shape: Shape = {
            "prefix": prefix,
            "suffix": max((len(plan.row_tokens(row)) for row in rows), default=0),
            "rows": len(rows),
            "gqa": gqa,
            "head_dim": head_dim,
        }
        nearest = min(points, key=lambda point: _distance(point, shape))
        for kernel in totals:
            totals[kernel] += nearest["us"].get(kernel, math.inf)
    return min(totals, key=lambda kernel: totals[kernel])


def _distance(point: Point, shape: Shape) -> float:
    """Doublings between a point and a shape, over all of its sizes."""
    pairs = (
        (point["prefix"], shape["prefix"]),
        (point["suffix"], shape["suffix"]),
        (point["rows"], shape["rows"]),
        (point["gqa"], shape["gqa"]),
        (point["head_dim"], shape["head_dim"]),
    )
    return sum(abs(math.log2((1 + measured) / (1 + size))) for measured, size in pairs)


@functools.cache
def points_of(device_name: str) -> tuple[Point, ...]:
    """What was measured on a device; nothing for one that was not."""
    path = _POINTS / f"{device_name.lower().replace(' ', '-')}.json"
    if not path.exists():
        return ()
    return tuple(json.loads(path.read_text())["points"])
