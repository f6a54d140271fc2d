"""Cases of the direction calls as functions of a backend; each returns the tensors it has written.

Run as a script, it compares every case on the triton backend, interpreted on the CPU, with the
reference, and prints a JSON object: the name of a case -> "" or what is wrong. The script has its
own process because triton decides at its import whether it interprets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch

import mezo_kernels as mk
from mezo_kernels.directions import plan as plan_module
from mezo_kernels.directions.fp32 import fma
from mezo_kernels.directions.scalars import scalars_of

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
SENTINEL = 7.0
SEED = 2**63 + 5

Tensors = list[torch.Tensor]
CASES: dict[str, Callable[[str, str], Tensors]] = {}


def case(*arguments):
    """Add a function (backend, device, *arguments) as one case for each of the arguments."""

    def add(function):
        for values in arguments:
            label = " ".join(str(value).removeprefix("torch.") for value in values)
            name = f"{function.__name__} {label}".strip()
            CASES[name] = lambda backend, device, v=values: function(backend, device, *v)
        return function

    return add


def normal(shape, device, seed=1, dtype=FLOAT32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def blank(shape, dtype, device) -> torch.Tensor:
    return torch.full(shape, SENTINEL, dtype=dtype, device=device)


def gaussian(step: int, index: int = 0) -> mk.Direction:
    return mk.Direction(SEED, step, index)


def signs(step: int, index: int = 0) -> mk.Direction:
    return mk.Direction(SEED, step, index, "rademacher")


# Name -> spec: each path of the kernel, and its edges.
SPECS = {
    # 3 blocks of 2048, the last one cut.
    "flat": mk.TensorSpec("flat", (9, 560)),
    # Rows of one vector.
    "tall": mk.TensorSpec("tall", (333, 8)),
    # Groups of four but not of eight elements.
    "fours": mk.TensorSpec("fours", (50, 12)),
    "rows": mk.TensorSpec("rows", (9, 560), 8, 0, (40, 560)),
    "columns": mk.TensorSpec("columns", (9, 320), 3, 160, (17, 640)),
    "odd": mk.TensorSpec("odd", (1030, 3)),
    "odd shard": mk.TensorSpec("odd shard", (40, 61), 3, 5, (49, 85)),
    "shifted": mk.TensorSpec("shifted", (9, 64), 1, 4, (12, 72)),
    "row": mk.TensorSpec("row", (1, 5)),
    "column": mk.TensorSpec("column", (7, 1)),
    "empty": mk.TensorSpec("empty", (0, 8)),
    # The last elements that there may be, on a vector path and on the general one.
    "far": mk.TensorSpec("far", (2, 64), 2**17 - 3, 2**17 - 128, (2**17 - 1, 2**17)),
    "far odd": mk.TensorSpec("far odd", (1, 99), 0, 2**34 - 1 - 99, (1, 2**34 - 1)),
}


@case(*((name, kind) for name in SPECS for kind in ("gaussian", "rademacher")))
def sample(backend, device, name, kind):
    direction = mk.Direction(SEED, 2**32 - 1, 2**24 - 1, kind)
    return [mk.sample(SPECS[name], direction, backend=backend, device=device)]


@case((FLOAT32,), (FLOAT16,), (BFLOAT16,))
def add_to_all_shapes(backend, device, dtype):
    specs = list(SPECS.values())
    tensors = [normal(spec.shape, device, i, dtype) for i, spec in enumerate(specs)]
    directions = [gaussian(9), signs(9), gaussian(9, 1)]
    mk.add_directions_(tensors, specs, directions, [0.5, -1e-3, 0.25], backend=backend)
    return tensors


@case((gaussian(3),), (signs(3),))
def add_one_in_place(backend, device, direction):
    spec = SPECS["flat"]
    tensor = normal(spec.shape, device)
    mk.add_directions_([tensor], [spec], [direction], [-0.1], backend=backend)
    return [tensor]


@case((300, 16, BFLOAT16), (40, 7, FLOAT32))
def add_many(backend, device, num_directions, cols, dtype):
    spec = mk.TensorSpec("many", (5, cols))
    tensor = normal(spec.shape, device, dtype=dtype)
    directions = [mk.Direction(4, 0)]
    directions += [gaussian(step, step % 3) for step in range(1, num_directions)]
    coefficients = [(-1) ** k * 1e-3 * (k + 1) for k in range(num_directions)]
    mk.add_directions_([tensor], [spec], directions, coefficients, backend=backend)
    return [tensor]


def masters_and_slots(names, num_slots, dtype, device):
    specs = [SPECS[name] for name in names]
    masters = [normal(spec.shape, device, i) for i, spec in enumerate(specs)]
    slots = [[blank(spec.shape, dtype, device) for spec in specs] for _ in range(num_slots)]
    return specs, masters, slots


def flat(slots) -> Tensors:
    return [tensor for slot in slots for tensor in slot]


PATHS = {
    "flat": ("flat", "tall"),
    "strided": ("columns",),
    "general": ("odd shard",),
    "blocks": ("flat", "odd"),
    "all": ("odd shard", "flat", "empty", "columns", "tall", "shifted"),
}


@case(
    *((path, BFLOAT16, 1) for path in ("flat", "strided", "general", "all")),
    ("all", FLOAT16, 1),
    ("all", FLOAT32, 1),
    ("flat", BFLOAT16, 0),
    ("flat", BFLOAT16, 3),
    ("general", FLOAT32, 3),
)
def perturb_pair(backend, device, path, dtype, num_updates):
    """+eps and -eps of one direction, after an update by some."""
    specs, masters, slots = masters_and_slots(PATHS[path], 2, dtype, device)
    update = ([gaussian(1, k) for k in range(num_updates)], [-0.05, 0.3, 1e-3][:num_updates])
    pair = [gaussian(2)] * 2
    mk.perturb_into(masters, specs, slots, pair, [1e-2, -1e-2], update=update, backend=backend)
    return masters + flat(slots)


@case(("flat", BFLOAT16), ("general", FLOAT16), ("all", BFLOAT16))
def perturb_five_with_a_copy(backend, device, path, dtype):
    """Directions out of order, signs among them, a plain copy, and a scale that changes nothing."""
    specs, masters, slots = masters_and_slots(PATHS[path], 5, dtype, device)
    directions = [gaussian(2, 1), gaussian(2), signs(2), gaussian(2, 1), gaussian(7)]
    scales = [1e-2, -1e-2, 0.5, 0.0, 1e-30]
    update = ([signs(1), gaussian(1)], [0.1, 0.2])
    mk.perturb_into(masters, specs, slots, directions, scales, update=update, backend=backend)
    return masters + flat(slots)


@case((8,), (9,))
def perturb_many(backend, device, num_directions):
    """More directions than one launch makes; first all +eps, then all -eps, and a copy."""
    specs, masters, slots = masters_and_slots(("tall",), 2 * num_directions + 1, BFLOAT16, device)
    half = [gaussian(2, index) for index in range(num_directions)]
    scales = [1e-2] * num_directions + [0.0] + [-1e-2] * num_directions
    directions = [*half, gaussian(0), *half]
    update = ([gaussian(1)], [0.1])
    mk.perturb_into(masters, specs, slots, directions, scales, update=update, backend=backend)
    return masters + flat(slots)


@case(())
def perturb_mixed_dtypes_in_one_slot(backend, device):
    specs = [SPECS[name] for name in ("flat", "columns", "odd")]
    masters = [normal(spec.shape, device) for spec in specs]
    orders = ((FLOAT32, FLOAT16, BFLOAT16), (BFLOAT16, FLOAT32, FLOAT16))
    slots = [
        [blank(s.shape, d, device) for s, d in zip(specs, order, strict=True)] for order in orders
    ]
    pair = [gaussian(2)] * 2
    mk.perturb_into(masters, specs, slots, pair, [1e-2, -1e-2], backend=backend)
    return masters + flat(slots)


@case(())
def add_mixed_dtypes(backend, device):
    names, dtypes = ("flat", "rows", "tall", "odd"), (FLOAT32, FLOAT16, BFLOAT16, BFLOAT16)
    specs = [SPECS[name] for name in names]
    tensors = [normal(s.shape, device, dtype=d) for s, d in zip(specs, dtypes, strict=True)]
    mk.add_directions_(tensors, specs, [gaussian(1)], [0.3], backend=backend)
    return tensors


def pool_views(rank, max_rank, dtype, device):
    """Slots of SGLang's pool: three A's packed by rank, B with a row stride of max_rank."""
    d_in, d_out = 64, 40
    pool_a = blank((3, 3 * max_rank, d_in), dtype, device)
    pool_b = blank((3, 3 * d_out, max_rank), dtype, device)
    slots = [
        [pool_a[slot, i * rank : (i + 1) * rank] for i in range(3)]
        + [pool_b[slot, i * d_out : (i + 1) * d_out, :rank] for i in range(3)]
        for slot in (0, 2)
    ]
    specs = [mk.TensorSpec(f"a{i}", (rank, d_in)) for i in range(3)]
    # B is split by rows over two ranks; this is the second.
    specs += [mk.TensorSpec(f"b{i}", (d_out, rank), d_out, 0, (2 * d_out, rank)) for i in range(3)]
    return specs, slots, [pool_a, pool_b]


@case((8, 8, BFLOAT16), (8, 16, BFLOAT16), (4, 8, FLOAT16), (3, 8, BFLOAT16), (16, 16, FLOAT32))
def perturb_into_a_pool(backend, device, rank, max_rank, dtype):
    specs, slots, pools = pool_views(rank, max_rank, dtype, device)
    arena = normal((sum(s.shape[0] * s.shape[1] for s in specs),), device)
    parts = arena.split([s.shape[0] * s.shape[1] for s in specs])
    masters = [part.view(spec.shape) for part, spec in zip(parts, specs, strict=True)]
    update = ([gaussian(1)], [-0.05])
    pair = [gaussian(2)] * 2
    mk.perturb_into(masters, specs, slots, pair, [1e-2, -1e-2], update=update, backend=backend)
    # With all of the memory around the slots.
    return [arena, *pools]


@case((FLOAT32,), (FLOAT16,), (BFLOAT16,))
def add_leaves_padding_alone(backend, device, dtype):
    bases = [blank((6, 40), dtype, device), blank((9, 9), dtype, device)]
    views = [bases[0][1:5, 8:32], bases[1][2:8, 1:8]]
    specs = [mk.TensorSpec("padded", (4, 24)), mk.TensorSpec("padded odd", (6, 7))]
    mk.add_directions_(views, specs, [gaussian(1)], [0.3], backend=backend)
    return bases


SPECIAL = [0.0, -0.0, 1e-8, 2**-24, 2**-25, 1.5 * 2**-25, 6e-5, 65504.0, 65519.996, 65520.0, 1e30]
SPECIAL += [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40, float("inf")]


@case(*((dtype, n) for dtype in (FLOAT32, FLOAT16, BFLOAT16) for n in (2048, 1999)))
def round_special_values(backend, device, dtype, n):
    generator = torch.Generator().manual_seed(3)
    special = torch.tensor(SPECIAL + [-value for value in SPECIAL])
    scale = torch.exp2(torch.randint(-30, 20, (n - len(special),), generator=generator).float())
    values = torch.cat((special, torch.randn(n - len(special), generator=generator) * scale))
    master, slot = values.reshape(1, n).to(device), blank((1, n), dtype, device)
    spec = mk.TensorSpec("rounding", (1, n))
    mk.perturb_into([master], [spec], [[slot]], [gaussian(0)], [0.0], backend=backend)
    return [master, slot]


@case(())
def large_and_tiny_coefficients(backend, device):
    """fma where products overflow, cancel and become subnormal."""
    spec = SPECS["tall"]
    tensors = [normal(spec.shape, device, i) * 10.0**e for i, e in enumerate((-42, -20, 0, 38))]
    for tensor, coefficient in zip(tensors, (1e-42, 1e-30, 1e-7, 3e38), strict=True):
        mk.add_directions_([tensor], [spec], [gaussian(1)], [coefficient], backend=backend)
    return tensors


def triton_calls():
    from mezo_kernels.directions import triton

    return triton


@case((0,), (1,))
def the_number_of_updates_is_read_on_the_device(backend, device, num_updates):
    specs, masters, slots = masters_and_slots(PATHS["all"], 2, BFLOAT16, device)
    moves = [gaussian(1), gaussian(1, 1)], [0.1, 0.2]
    pair = [gaussian(2)] * 2, [1e-2, -1e-2]
    plan = mk.AdapterPlan(masters, specs, slots)
    if backend == "triton":
        scalars = scalars_of(plan.device, *pair, moves)
        count = torch.full_like(scalars.num_updates, num_updates)
        triton_calls().perturb_scalars(plan, dataclasses.replace(scalars, num_updates=count))
    else:
        update = tuple(part[:num_updates] for part in moves)
        mk.perturb_into(plan, directions=pair[0], scales=pair[1], update=update, backend=backend)
    return masters + flat(slots)


@contextmanager
def work_blocks_of(size: int):
    """Plans and kernels with blocks of another size."""
    before = plan_module.WORK_BLOCK
    plan_module.WORK_BLOCK = triton_calls().WORK_BLOCK = size
    try:
        yield
    finally:
        plan_module.WORK_BLOCK = triton_calls().WORK_BLOCK = before


@case((1024,), (4096,))
def other_block_sizes(backend, device, size):
    if backend != "triton":
        return perturb_pair(backend, device, "blocks", BFLOAT16, 1)
    with work_blocks_of(size):
        return perturb_pair(backend, device, "blocks", BFLOAT16, 1)


def edge_words() -> torch.Tensor:
    """Words where the exact Gaussian changes branch, `[N, 2]`: radius and angle."""
    big, eighth = 0xB504F300, 1 << 29
    radius = [0, 1, 2, 3, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 3, 2**31, 2**32 - 2, 2**32 - 1]
    radius += [big + offset for offset in (*range(-300, 301, 20), -1, 1)]
    angle = [0, 1, 2**32 - 1]
    for center in range(0, 2**32, eighth):
        angle += [(center + offset) % 2**32 for offset in (-65, -1, 0, 1, 65)]
    return torch.cartesian_prod(torch.tensor(radius), torch.tensor(angle))


@case(())
def edge_words_of_the_gaussian(backend, device):
    words = edge_words()
    if backend != "triton":
        from mezo_kernels.directions.philox import normals_of_words

        return [normals_of_words(torch.cat((words, words), dim=1))[:, :2].contiguous()]
    from tests.support.triton_probes import box_muller_of_words

    return [box_muller_of_words(words, device)]


@case(())
def fma_near_ties(backend, device):
    """Sums that float64 rounds to a tie of fp32, which they are not: it would round them twice."""
    generator = torch.Generator().manual_seed(5)
    n, ulp = 2048, 2.0**-23
    c = 1 + torch.randint(0, 2**23, (n,), generator=generator) * ulp
    # (1 + x)(1 - x) = 1 - x^2: half an ulp less at most 2**-50, a few of float64's last bits.
    x = torch.randint(1, 1024, (n,), generator=generator) * ulp
    sign = 1.0 - 2.0 * torch.randint(0, 2, (n,), generator=generator)
    a, b = sign * (ulp / 2) * (1 + x), 1 - x
    if backend == "triton":
        from tests.support.triton_probes import fma_of

        return [fma_of(a.to(device), b.to(device), c.to(device))]
    return [fma(a, b, c)]


def difference(ours: Tensors, theirs: Tensors) -> str:
    """Where bits differ, or ""."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype
        width = {4: torch.int32, 2: torch.int16}[a.element_size()]
        is_wrong = a.cpu().contiguous().view(width) != b.cpu().contiguous().view(width)
        if is_wrong.any():
            where = tuple(is_wrong.nonzero()[0].tolist())
            return (
                f"tensor {i} {tuple(a.shape)} {a.dtype}: {int(is_wrong.sum())} of {a.numel()} "
                f"differ, first {where}: {a[where].item()!r}, expected {b[where].item()!r}"
            )
    return ""


def main(names: list[str]) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    results = {}
    for name in names or CASES:
        try:
            ours, theirs = CASES[name]("triton", "cpu"), CASES[name]("reference", "cpu")
            results[name] = difference(ours, theirs)
        # Whatever it is, it is this case's failure and not the other cases'.
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"[:500]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
