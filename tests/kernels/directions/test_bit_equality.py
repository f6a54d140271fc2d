"""Every backend and code path gives the bits of the reference, whatever the layout."""

from dataclasses import dataclass

import pytest
import torch

import mezo_kernels as mk

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Odd sizes cut groups of 4, batches of 8 and 16 and sign blocks of 128; (1030, 33) has more than
# one work item; the last tensors are a row, a column and nothing.
SHAPES = ((40, 333), (333, 8), (1030, 33), (1, 5), (7, 1), (0, 4), (3, 0))
SENTINEL = 7.0


@dataclass(frozen=True)
class Layout:
    """Where the tensors lie: shards of larger ones, and views into padded memory."""

    is_shard: bool
    is_padded: bool

    def spec(self, i: int, shape: tuple[int, int]) -> mk.TensorSpec:
        if not self.is_shard:
            return mk.TensorSpec(f"tensor{i}", shape)
        return mk.TensorSpec(f"tensor{i}", shape, 3, 5 + i, (shape[0] + 9, shape[1] + 21))

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """A view that holds ``values``; its base is padding around them."""
        if not self.is_padded:
            return values.clone()
        rows, cols = values.shape
        base = torch.full((rows + 2, cols + 5), SENTINEL, dtype=values.dtype)
        view = base[1 : rows + 1, 3 : cols + 3]
        view.copy_(values)
        return view


LAYOUTS = {
    "whole": Layout(False, False),
    "padded": Layout(False, True),
    "shard": Layout(True, False),
    "padded shard": Layout(True, True),
}


def everything(tensors):
    """The tensors with the padding around them."""
    return [tensor if tensor._base is None else tensor._base for tensor in tensors]


def directions():
    return [
        mk.Direction(2**63 + 5, 9, 0),
        mk.Direction(2**63 + 5, 9, 1),
        mk.Direction(2**63 + 5, 9, 0, "rademacher"),
        mk.Direction(6, 2**32 - 1, 2**24 - 1),
    ]


def run_add(layout: Layout, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = [layout.place(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    specs = [layout.spec(i, shape) for i, shape in enumerate(SHAPES)]
    coefficients = [0.5, -1e-3, 0.25, 1e-2]
    mk.add_directions_(tensors, specs, directions(), coefficients, backend=backend)
    return everything(tensors)


def run_perturb(layout: Layout, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    masters = [layout.place(torch.randn(s, generator=generator)) for s in SHAPES]
    specs = [layout.spec(i, shape) for i, shape in enumerate(SHAPES)]
    blank = [torch.full(shape, SENTINEL, dtype=dtype) for shape in SHAPES]
    outputs = [[layout.place(values) for values in blank] for _ in range(5)]
    first, second, signs, last = directions()
    plan = mk.AdapterPlan(masters, specs, outputs)
    mk.perturb_into(
        plan,
        directions=[first, first, signs, last, second],
        scales=[1e-2, -1e-2, 0.5, 0.0, 1e-30],
        update=([last, second], [0.1, 0.2]),
        backend=backend,
    )
    return everything(masters) + [t for slot in outputs for t in everything(slot)]


@pytest.fixture(scope="module")
def expected():
    """The reference's results, computed once per case."""
    results: dict = {}

    def get(run, layout, dtype):
        key = (run, layout, dtype)
        if key not in results:
            results[key] = run(LAYOUTS[layout], dtype, "reference")
        return results[key]

    return get


def assert_same_bits(got, expected, bits):
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(bits(ours), bits(theirs)), i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_directions(isa, threads, layout, dtype, expected, bits):
    got = run_add(LAYOUTS[layout], dtype, "cpu")
    assert_same_bits(got, expected(run_add, layout, dtype), bits)


def test_many_directions_in_one_call(isas, bits):
    """More than are made ready at once, in runs of a seed and of a distribution, several indices.

    The tensor is a batch of registers and a bit, its shard begins inside of a group of four.
    """
    spec = mk.TensorSpec("many", (1, 75), 3, 2, (9, 101))
    runs = [(1, "gaussian", 131), (2, "gaussian", 64), (2, "rademacher", 3), (2, "gaussian", 1)]
    named = [(seed, kind) for seed, kind, count in runs for _ in range(count)]
    directions = [mk.Direction(s, 2**32 - 1 - k, k % 3, d) for k, (s, d) in enumerate(named)]
    coefficients = [(-1) ** k * 1e-2 * (k + 1) for k in range(len(named))]

    def run(backend):
        tensor = torch.ones(spec.shape)
        mk.add_directions_([tensor], [spec], directions, coefficients, backend=backend)
        return bits(tensor)

    expected = run("reference")
    for isa in isas():
        assert torch.equal(run("cpu"), expected), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_perturb_into(isa, threads, layout, dtype, expected, bits):
    got = run_perturb(LAYOUTS[layout], dtype, "cpu")
    assert_same_bits(got, expected(run_perturb, layout, dtype), bits)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_padding_is_untouched(backend):
    if mk.backends()[backend] is not None:
        pytest.skip("native module")
    layout = LAYOUTS["padded shard"]
    bases = run_add(layout, torch.bfloat16, backend)
    bases += run_perturb(layout, torch.float16, backend)
    for base in bases:
        padding = torch.ones_like(base, dtype=torch.bool)
        padding[1:-1, 3:-2] = False
        assert (base[padding] == SENTINEL).all()


@pytest.mark.parametrize(("distribution", "rows"), [("gaussian", 4003), ("rademacher", 403)])
def test_sample_of_a_large_tensor(isas, distribution, rows, bits):
    # 10.5 M normals, 1 M signs; the reference is drawn once and compared with every path.
    spec = mk.TensorSpec("large", (rows, 2621), 77, 0, (10_000, 2621))
    direction = mk.Direction(123456789, 20_000, 3, distribution)
    reference = bits(mk.sample(spec, direction, backend="reference"))
    assert reference.numel() > (10**7 if distribution == "gaussian" else 10**6)
    for name in isas():
        assert torch.equal(bits(mk.sample(spec, direction, backend="cpu")), reference), name


def test_sample_at_the_end_of_the_largest_tensor(isa, bits):
    # The last groups: c0 = 2**32 - 1, and a batch that runs past it must wrap unseen.
    for distribution in ("gaussian", "rademacher"):
        spec = mk.TensorSpec("far", (1, 1003), 0, 2**34 - 1 - 1003, (1, 2**34 - 1))
        direction = mk.Direction(1, 2, 3, distribution)
        reference = mk.sample(spec, direction, backend="reference")
        assert torch.equal(bits(mk.sample(spec, direction, backend="cpu")), bits(reference))


SPECIAL = [0.0, -0.0, 1e-8, 2**-24, 2**-25, 1.5 * 2**-25, 6e-5, 65504.0, 65519.996, 65520.0, 1e30]
SPECIAL += [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40, float("inf")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_that_of_torch(isa, dtype, bits):
    generator = torch.Generator().manual_seed(3)
    special = torch.tensor(SPECIAL + [-value for value in SPECIAL])
    scale = torch.exp2(torch.randint(-30, 20, (4096,), generator=generator).float())
    values = torch.cat((special, torch.randn(4096, generator=generator) * scale))
    # Every length has another split into vector and tail.
    for n in (1, 7, 22, 36, len(values)):
        master, output = values[:n].reshape(1, n).clone(), torch.empty(1, n, dtype=dtype)
        direction = mk.Direction(0, 0)
        spec = mk.TensorSpec("rounding", (1, n))
        mk.perturb_into([master], [spec], [[output]], [direction], [0.0], backend="cpu")
        assert torch.equal(bits(output), bits(master.to(dtype)))
        # And back: a round trip through fp32 keeps every value of the dtype.
        mk.add_directions_([output], [spec], backend="cpu")
        assert torch.equal(bits(output), bits(master.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(isa, dtype):
    n = 37
    master, output = torch.full((1, n), float("nan")), torch.zeros(2, n, dtype=dtype)
    spec = mk.TensorSpec("nan", (1, n))
    pair = [mk.Direction(0, 0)] * 2
    slots = [[output[:1]], [output[1:]]]
    mk.perturb_into([master], [spec], slots, pair, [0.0, 0.5], backend="cpu")
    assert output.isnan().all()
