"""The cuda and triton backends give the bits of the cpu backend: any tensors, slots, directions."""

import pytest
import torch

import mezo_kernels as mk

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Vector tensors (columns a multiple of 8) of one and of several work entries, with a last entry
# that is not full; then odd sizes, a row, a column, fewer columns than a thread's run, and nothing.
VECTOR_SHAPES = ((8, 520), (333, 8), (1, 2056), (130, 16))
SHAPES = (*VECTOR_SHAPES, (40, 333), (1030, 3), (1, 5), (7, 1), (0, 4), (3, 0))
SENTINEL = 7.0


def spec_of(i: int, shape: tuple[int, int], shard: str) -> mk.TensorSpec:
    """A whole tensor, a shard cut at multiples of 8, or a shard cut anywhere."""
    if shard == "whole":
        return mk.TensorSpec(f"tensor{i}", shape)
    row0, col0, right = (3, 16, 24) if shard == "even" else (3, 5 + i, 21)
    whole = (shape[0] + 9, shape[1] + col0 + right)
    return mk.TensorSpec(f"tensor{i}", shape, row0, col0, whole)


def place(shape, dtype, device, padding, seed=0) -> torch.Tensor:
    """Random values in a view of a larger buffer full of sentinels; padding 8 keeps alignment."""
    rows, cols = shape
    base = torch.full((rows + 2, cols + 2 * padding), SENTINEL, dtype=dtype, device=device)
    view = base[1 : rows + 1, padding : padding + cols]
    generator = torch.Generator().manual_seed(seed)
    view.copy_(torch.randn(shape, generator=generator).to(dtype))
    return view


def bases(tensors) -> list[torch.Tensor]:
    """The tensors with the padding around them, on the host."""
    return [(t if t._base is None else t._base).cpu() for t in tensors]


def assert_same_bits(ours, expected, bits):
    assert len(ours) == len(expected)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(bits(a), bits(b)), i


def on_both(run, backend):
    """run(name, device) on the backend under test and on the cpu backend."""
    return run(backend.name, backend.device), run("cpu", "cpu")


@pytest.fixture(autouse=True)
def _needs_native(native):
    """The expected bits are those of the native module."""


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shard", ["whole", "even", "odd"])
def test_sample(backend, bits, shard, distribution):
    direction = mk.Direction(2**63 + 5, 9, 3, distribution)
    for i, shape in enumerate(SHAPES):
        spec = spec_of(i, shape, shard)
        z = mk.sample(spec, direction, backend=backend.name, device=backend.device)
        assert torch.equal(bits(z.cpu()), bits(mk.sample(spec, direction, backend="cpu")))


def test_sample_at_the_end_of_the_largest_tensor(backend, bits):
    # The last groups, c0 = 2**32 - 1, and element indices beyond 32 bits.
    for distribution in ("gaussian", "rademacher"):
        spec = mk.TensorSpec("far", (1, 1003), 0, 2**34 - 1 - 1003, (1, 2**34 - 1))
        direction = mk.Direction(1, 2, 3, distribution)
        z = mk.sample(spec, direction, backend=backend.name, device=backend.device)
        assert torch.equal(bits(z.cpu()), bits(mk.sample(spec, direction, backend="cpu")))


# One seed and one distribution have their own kernels; anything else shares one.
KINDS = {
    "gaussian": lambda k: mk.Direction(2**63 + 5, 9 + k // 2, k),
    "rademacher": lambda k: mk.Direction(2**33 + 1, 9, k, "rademacher"),
    "mixed": lambda k: mk.Direction(k, 2, 3, ("gaussian", "rademacher")[k % 2]),
    "seeds": lambda k: mk.Direction(2**40 * k + 3, 2**32 - 1, 2**24 - 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard", ["whole", "even", "odd"])
def test_add_directions(backend, bits, shard, dtype, kind):
    directions = [KINDS[kind](k) for k in range(3)]

    def run(name, device):
        tensors = [place(s, dtype, device, 8 if i % 2 else 3, i) for i, s in enumerate(SHAPES)]
        specs = [spec_of(i, shape, shard) for i, shape in enumerate(SHAPES)]
        plan = mk.AdapterPlan(tensors, specs)
        mk.add_directions_(
            plan, directions=directions, coefficients=[0.1, -3e-3, 1e-30], backend=name
        )
        return bases(tensors)

    assert_same_bits(*on_both(run, backend), bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard", ["whole", "even"])
def test_add_directions_to_vector_tensors_alone(backend, bits, shard, dtype):
    directions = [KINDS["gaussian"](k) for k in range(3)]

    def run(name, device):
        tensors = [place(s, dtype, device, 8, i) for i, s in enumerate(VECTOR_SHAPES)]
        # Buffers begin at multiples of 64 bytes, and their first row is padding.
        specs = [spec_of(i, shape, shard) for i, shape in enumerate(VECTOR_SHAPES)]
        plan = mk.AdapterPlan(tensors, specs)
        assert plan.device_tables().num_vector == len(plan.device_tables().work)
        mk.add_directions_(plan, directions=directions, coefficients=[1, 2, 3], backend=name)
        return bases(tensors)

    assert_same_bits(*on_both(run, backend), bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_updates", [0, 1, 2])
@pytest.mark.parametrize("shard", ["whole", "even", "odd"])
def test_perturb_into(backend, bits, shard, num_updates, kind):
    directions = [KINDS[kind](k) for k in range(4)]
    slots = [directions[i] for i in (2, 0, 2, 1, 0)]
    scales = [1e-2, 0.5, -1e-2, 0.0, -0.5]

    def run(name, device):
        specs = [spec_of(i, shape, shard) for i, shape in enumerate(SHAPES)]
        padding = [8 if i % 2 else 3 for i in range(len(SHAPES))]
        masters = [place(s, torch.float32, device, 8, i) for i, s in enumerate(SHAPES)]
        outputs = [
            [place(s, DTYPES[k % 3], device, padding[i]) for i, s in enumerate(SHAPES)]
            for k in range(5)
        ]
        plan = mk.AdapterPlan(masters, specs, outputs)
        tables = plan.device_tables()
        if shard != "odd":
            assert 0 < tables.num_vector < len(tables.work)
        update = (directions[:num_updates], [0.1, -0.2][:num_updates])
        mk.perturb_into(plan, directions=slots, scales=scales, update=update, backend=name)
        return bases(masters) + [base for slot in outputs for base in bases(slot)]

    assert_same_bits(*on_both(run, backend), bits)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("has_update", [False, True], ids=["pair", "update and pair"])
@pytest.mark.parametrize("dtypes", [(0, 0), (1, 1), (2, 2), (0, 2)], ids=str)
def test_pair(backend, bits, dtypes, has_update, distribution):
    now, before = (mk.Direction(11, step, 0, distribution) for step in (5, 4))

    def run(name, device):
        specs = [spec_of(i, shape, "even") for i, shape in enumerate(VECTOR_SHAPES)]
        masters = [place(s, torch.float32, device, 8, i) for i, s in enumerate(VECTOR_SHAPES)]
        outputs = [[place(s, DTYPES[d], device, 8) for s in VECTOR_SHAPES] for d in dtypes]
        plan = mk.AdapterPlan(masters, specs, outputs)
        assert plan.device_tables().num_vector == len(plan.device_tables().work)
        update = ([before], [-0.125]) if has_update else None
        mk.perturb_into(
            plan, directions=[now, now], scales=[1e-2, -1e-2], update=update, backend=name
        )
        return bases(masters) + [base for slot in outputs for base in bases(slot)]

    assert_same_bits(*on_both(run, backend), bits)


@pytest.mark.parametrize("shard", ["whole", "rows", "columns"])
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64])
def test_slots_of_sglang(backend, bits, rank, shard):
    # A is packed by the adapter's rank in (slots, 3 max_rank, d_in), B has rows of max_rank.
    d_in, d_out, max_rank, parts = 72, 56, 64, 3

    def specs():
        for part in "qkv"[:parts]:
            whole_a, whole_b = (rank, d_in), (d_out, rank)
            if shard == "columns":  # a tensor-parallel shard of the inputs
                yield mk.TensorSpec(f"{part}.A", whole_a, 0, d_in, (rank, 2 * d_in))
                yield mk.TensorSpec(f"{part}.B", whole_b)
            elif shard == "rows":  # and of the outputs, cut at an odd row
                yield mk.TensorSpec(f"{part}.A", whole_a)
                yield mk.TensorSpec(f"{part}.B", whole_b, 13, 0, (2 * d_out, rank))
            else:
                yield mk.TensorSpec(f"{part}.A", whole_a)
                yield mk.TensorSpec(f"{part}.B", whole_b)

    def run(name, device):
        poison = {"dtype": torch.bfloat16, "device": device}
        pool_a = torch.full((3, parts * max_rank, d_in), SENTINEL, **poison)
        pool_b = torch.full((3, parts * d_out, max_rank), SENTINEL, **poison)
        outputs = [
            [
                view
                for p in range(parts)
                for view in (
                    pool_a[slot, p * rank : (p + 1) * rank],
                    pool_b[slot, p * d_out : (p + 1) * d_out, :rank],
                )
            ]
            for slot in (2, 0)
        ]
        names = list(specs())
        masters = [place(spec.shape, torch.float32, device, 8, i) for i, spec in enumerate(names)]
        plan = mk.AdapterPlan(masters, names, outputs)
        mk.perturb_into(
            plan,
            directions=[mk.Direction(3, 1)] * 2,
            scales=[1e-3, -1e-3],
            update=([mk.Direction(3, 0)], [0.25]),
            backend=name,
        )
        assert (pool_a[1] == SENTINEL).all()
        assert (pool_b[1] == SENTINEL).all()
        return [*bases(masters), pool_a.cpu(), pool_b.cpu()]

    assert_same_bits(*on_both(run, backend), bits)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_many_directions(backend, bits, kind):
    directions = [KINDS[kind](k) for k in range(1000)]
    coefficients = [1e-3 * (-1) ** k / (1 + k) for k in range(1000)]

    def run(name, device):
        shapes = ((8, 520), (3, 35))
        tensors = [place(s, torch.float32, device, 8, i) for i, s in enumerate(shapes)]
        specs = [mk.TensorSpec(f"replay{i}", s) for i, s in enumerate(shapes)]
        mk.add_directions_(tensors, specs, directions, coefficients, backend=name)
        return bases(tensors)

    assert_same_bits(*on_both(run, backend), bits)


def test_more_slots_than_one_launch_has(backend, bits):
    # Directions in no order, some of the slots plain copies. Triton compiles a kernel for each
    # number of slots and directions, unrolled: minutes for what cuda has.
    num_slots, num_directions = (40, 18) if backend.name == "triton" else (300, 90)
    directions = [mk.Direction(1, 2, (7 * k) % num_directions) for k in range(num_slots)]
    scales = [0.0 if k % 11 == 0 else 0.01 * k for k in range(num_slots)]

    def run(name, device):
        shapes = ((8, 16), (3, 5))
        masters = [place(s, torch.float32, device, 8, i) for i, s in enumerate(shapes)]
        specs = [mk.TensorSpec(f"many{i}", s) for i, s in enumerate(shapes)]
        outputs = [[place(s, torch.bfloat16, device, 8) for s in shapes] for _ in directions]
        update = ([mk.Direction(1, 1)], [0.5])
        mk.perturb_into(masters, specs, outputs, directions, scales, update=update, backend=name)
        return bases(masters) + [base for slot in outputs for base in bases(slot)]

    assert_same_bits(*on_both(run, backend), bits)


def test_nothing_to_do(backend):
    tensor = torch.ones(8, 8, device=backend.device)
    empty = torch.ones(0, 8, device=backend.device)
    spec, none = mk.TensorSpec("t", (8, 8)), mk.TensorSpec("none", (0, 8))
    mk.add_directions_([tensor], [spec], backend=backend.name)
    mk.add_directions_([empty], [none], [mk.Direction(0, 0)], [1.0], backend=backend.name)
    mk.perturb_into([tensor], [spec], [], update=([], []), backend=backend.name)
    assert (tensor == 1).all()
    z = mk.sample(none, mk.Direction(0, 0), backend=backend.name, device=backend.device)
    assert z.shape == (0, 8)


def test_the_module_counts_as_the_plan_does(native):
    from mezo_kernels.directions import plan

    assert (native.WORK_BLOCK, native.VECTOR) == (plan.WORK_BLOCK, plan.VECTOR)
