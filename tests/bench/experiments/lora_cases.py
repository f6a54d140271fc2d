"""Checks of perturbed_lora on any backend, also as a program.

Run as a program with TRITON_INTERPRET=1, because triton decides at its import: prints one line of
JSON, {check: null or the traceback}. fp32 and fp16 only: the interpreter gets bf16 wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

import mezo_kernels as mk
from bench.experiments.lora import perturbed_lora
from tests.support.gates import assert_close_to_reference
from tests.support.interpreted import checks_of, report

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
SENTINEL = 7.0
NEXT = mk.Direction(2**63 + 5, 9, 3)


@dataclass(frozen=True)
class Target:
    """A backend, its device, and what it supports and promises."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...] = (FLOAT32, FLOAT16, BFLOAT16)
    # Ranks and sizes that are no multiples of 8.
    takes_odd: bool = True
    # A row has the same bits whatever the other rows are.
    is_invariant: bool = True
    # Fewer and smaller cases, for a backend that needs a second for each.
    is_slow: bool = False


@dataclass
class Problem:
    """Inputs on the CPU, and the call on any backend."""

    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    a_spec: mk.TensorSpec
    b_spec: mk.TensorSpec
    directions: list[mk.Direction]
    scales: list[float]
    row_indptr: list[int]
    scaling: float = 2.0
    out: torch.Tensor | None = None

    def on(self, device: str) -> list[torch.Tensor | None]:
        """x, a, b and out; themselves where the device is the CPU."""
        tensors = (self.x, self.a, self.b, self.out)
        return [t if t is None or device == "cpu" else t.to(device) for t in tensors]

    def run(self, target: Target) -> torch.Tensor:
        x, a, b, out = self.on(target.device)
        with poisoned_memory():
            y = perturbed_lora(
                x,
                a,
                b,
                self.a_spec,
                self.b_spec,
                self.directions,
                self.scales,
                row_indptr=self.row_indptr,
                scaling=self.scaling,
                out=out,
                backend=target.name,
            )
        assert out is None or y is out
        return y.cpu()

    def factors(self) -> list[list[torch.Tensor]]:
        """The slots that `perturb_into` writes."""
        slots = [
            [torch.empty_like(f, dtype=self.x.dtype) for f in (self.a, self.b)] for _ in self.scales
        ]
        specs = [self.a_spec, self.b_spec]
        mk.perturb_into(
            [self.a, self.b], specs, slots, self.directions, self.scales, backend="reference"
        )
        return slots

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(float64 result, the result of torch in the dtype of x, bound of an error)."""
        unit = torch.finfo(self.x.dtype).eps / 2
        references, sames, bound = [], [], 0.0
        for (a, b), (first, last) in zip(self.factors(), pairwise(self.row_indptr), strict=True):
            x, base = self.x[first:last], None if self.out is None else self.out[first:last]
            same = ((x @ a.T) @ b.T) * self.scaling
            x, a, b = x.double(), a.double(), b.double()
            h = x @ a.T
            y = h @ b.T * self.scaling
            references.append(y if base is None else y + base.double())
            sames.append(same if base is None else same + base)
            # h is rounded once after a sum in fp32, which walks at random; so is y.
            size = x.abs() @ a.abs().T
            error = unit * h.abs() + 2**-24 * math.sqrt(x.shape[1]) * size
            walk = 2**-24 * math.sqrt(a.shape[0]) * (h.abs() + error)
            total = (error + walk) @ b.abs().T * abs(self.scaling)
            total += (unit + 2**-23) * references[-1].abs()
            bound = max(bound, float(total.max()) if total.numel() else 0.0)
        return torch.cat(references), torch.cat(sames), bound


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(
    dtype: torch.dtype,
    rank: int = 8,
    d_in: int = 520,
    d_out: int = 200,
    rows: tuple[int, ...] = (40, 35),
    directions: list[mk.Direction] | None = None,
    scales: list[float] | None = None,
    shard: str = "whole",
    has_out: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem with factors and perturbations of one size."""
    a_spec = mk.TensorSpec("m.q_proj.lora_A", (rank, d_in))
    b_spec = mk.TensorSpec("m.q_proj.lora_B", (d_out, rank))
    if shard == "even":  # what tensor parallelism cuts
        a_spec = mk.TensorSpec(a_spec.name, (rank, d_in), 0, 16, (rank, d_in + 24))
        b_spec = mk.TensorSpec(b_spec.name, (d_out, rank), 13, 0, (d_out + 20, rank))
    elif shard == "odd":
        a_spec = mk.TensorSpec(a_spec.name, (rank, d_in), 1, 3, (rank + 2, d_in + 10))
        b_spec = mk.TensorSpec(b_spec.name, (d_out, rank), 7, 1, (d_out + 9, rank + 2))
    T = sum(rows)
    ends = [sum(rows[:k]) for k in range(len(rows) + 1)]
    return Problem(
        normal(T, d_in, seed=seed).to(dtype),
        normal(rank, d_in, seed=seed + 1) / math.sqrt(d_in),
        normal(d_out, rank, seed=seed + 2) / math.sqrt(rank),
        a_spec,
        b_spec,
        directions or [NEXT] * len(rows),
        scales or [0.05, -0.05][: len(rows)],
        ends,
        out=normal(T, d_out, seed=seed + 3).to(dtype) if has_out else None,
    )


def assert_right(problem: Problem, target: Target) -> None:
    reference, same, bound = problem.reference()
    assert_close_to_reference(problem.run(target), same, reference, bound)


def ranks_of(target: Target) -> tuple[int, ...]:
    if target.is_slow:
        return 8, 3, 70
    return (8, 16, 64, *((3, 4, 70) if target.takes_odd else (32,)))


def check_the_factors_have_the_bits_of_perturb_into(target: Target) -> None:
    for dtype in target.dtypes:
        # A factor 2^n I takes the other factor out of the product as it is: what its own
        # perturbation adds is too small to be seen in a sum of fp32.
        big, eps, size = (2.0**15, 2.0**-20, 2.0**-18) if dtype == FLOAT16 else (2.0**60, 1e-3, 0.1)
        for rank in ranks_of(target):
            d_in = max(72 if target.is_slow else 264, rank)
            shard = "odd" if target.takes_odd and rank in (3, 16) else "even"
            options = {"scales": [eps, -eps], "shard": shard, "d_in": d_in}
            # x = I gives the columns of A, row by row of B.
            of_a = make(dtype, rank, d_out=rank, rows=(d_in, d_in), **options)
            of_a.x = torch.eye(d_in).repeat(2, 1).to(dtype)
            of_a.a, of_a.b = normal(rank, d_in, seed=1) * size, big * torch.eye(rank)
            of_b = make(dtype, rank, d_out=200, rows=(rank, rank), **options)
            of_b.x = torch.eye(rank, d_in).repeat(2, 1).to(dtype)
            of_b.a, of_b.b = big * torch.eye(rank, d_in), normal(200, rank, seed=2) * size
            for which, problem in enumerate((of_a, of_b)):
                problem.scaling = 1 / big
                copies = problem.run(target).chunk(2)
                factors = [slot[which] for slot in problem.factors()]
                for copy, factor in zip(copies, factors, strict=True):
                    assert torch.equal(copy.T, factor), (dtype, rank)
                assert not torch.equal(*factors)


def check_against_float64(target: Target) -> None:
    for dtype in target.dtypes:
        for i, rank in enumerate(ranks_of(target)):
            for has_out in (False, True):
                shards = ("whole", "even", *(("odd",) if target.takes_odd else ()))
                for shard in shards if rank in (3, 8, 64) else shards[:1]:
                    # Less than one tile and part of the columns; several tiles of everything.
                    sizes = {"d_in": 48, "d_out": 40, "rows": (5, 20)}
                    if has_out and target.is_slow:
                        sizes = {"d_in": 264, "d_out": 72, "rows": (75, 40)}
                    elif has_out:
                        sizes = {"d_in": 1064, "d_out": 328, "rows": (75, 40)}
                    if shard == "odd":
                        sizes |= {"d_in": sizes["d_in"] + 3, "d_out": sizes["d_out"] - 1}
                    problem = make(dtype, rank, shard=shard, has_out=has_out, seed=i, **sizes)
                    assert_right(problem, target)


def check_several_directions(target: Target) -> None:
    others = [mk.Direction(2**63 + 5, 9, k) for k in range(3)]
    signs = [mk.Direction(5, 2**32 - 1, k, "rademacher") for k in range(2)]
    mixed = [mk.Direction(k, 2, 3, ("gaussian", "rademacher")[k % 2]) for k in range(3)]
    for dtype in target.dtypes:
        for directions, scales, rows in (
            # Two pairs, then three and more copies of one direction, empty ones, exact copies.
            ([others[0], others[0], others[1], others[1]], [0.1, -0.1, 0.2, -0.2], (20, 20, 9, 40)),
            ([others[1], others[0], others[1], others[1]], [0.1, 0.3, -0.2, 0.4], (5, 33, 0, 64)),
            ([others[0], others[0], others[2]], [0.0, 0.2, 0.0], (17, 34, 3)),
            ([others[0], others[1]], [0.0, -0.0], (10, 12)),
            ([signs[0], signs[0], signs[1]], [0.1, -0.1, 0.2], (33, 20, 8)),
            (mixed, [0.1, -0.2, 0.3], (16, 40, 4)),
            ([others[0]], [0.1], (50,)),
        ):
            problem = make(
                dtype, d_in=264, d_out=72, rows=rows, directions=directions, scales=scales
            )
            assert_right(problem, target)


def check_views_and_what_is_around_them(target: Target) -> None:
    for dtype in target.dtypes:
        expected = make(dtype, has_out=True).run(target)
        problem = make(dtype, has_out=True)
        bases = {}
        for name in ("x", "a", "b", "out"):
            tensor = getattr(problem, name)
            rows, cols = tensor.shape
            bases[name] = torch.full((rows + 2, cols + 16), SENTINEL, dtype=tensor.dtype)
            bases[name] = bases[name].to(target.device)
            view = bases[name][1 : rows + 1, 8 : cols + 8]
            view.copy_(tensor)
            setattr(problem, name, view)
        assert torch.equal(problem.run(target), expected)
        assert torch.equal(problem.out.cpu(), expected)
        for base in bases.values():
            for around in (base[0], base[-1], base[:, :8], base[:, -8:]):
                assert around.eq(SENTINEL).all()


def check_rows_of_one_content_have_one_result(target: Target) -> None:
    if not target.is_invariant:
        return
    for dtype in target.dtypes:
        for rank in (8,) if target.is_slow else (8, 64):
            sizes = {"d_in": 264 if target.is_slow else 520, "d_out": 72}
            problem = make(dtype, rank, rows=(60, 90), scales=[0.1, 0.1], **sizes)
            problem.x[60:120] = problem.x[:60]
            y = problem.run(target)
            assert torch.equal(y[60:120], y[:60])
            # Other rows, another place in the tiles, another copy, fewer rows.
            alone = make(dtype, rank, rows=(7,), scales=[0.1], **sizes)
            alone.x = problem.x[23:30].clone()
            assert torch.equal(alone.run(target), y[23:30])
            assert torch.equal(problem.run(target), y)


def check_nothing_to_do(target: Target) -> None:
    for dtype in target.dtypes:
        for sizes in ({"rows": (0, 0)}, {"rank": 0}, {"d_in": 0}, {"d_out": 0}):
            problem = make(dtype, **{"d_in": 16, "d_out": 8, **sizes})
            y = problem.run(target)
            assert y.shape == (len(problem.x), len(problem.b))
            assert y.eq(0).all()
            problem.out = torch.full_like(y, SENTINEL)
            assert problem.run(target).eq(SENTINEL).all()


CHECKS = checks_of(globals())


def main() -> None:
    target = Target("triton", "cpu", (FLOAT32, FLOAT16), is_slow=True)
    report(CHECKS, target)


if __name__ == "__main__":
    main()
