"""MEZO_CUDA_LANES: which elements a thread of the cuda backend has changes no bit."""

from types import SimpleNamespace

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels.directions import cuda
from mezo_kernels.directions.scalars import scalars_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SENTINEL = 7.0


def random_shape(random: torch.Generator) -> tuple[int, int]:
    """Rows a multiple of 8 long, some of 8 alone; from one quad's thread to several blocks."""
    cols = 8 * draw(random, 1, draw(random, 2, 40))
    return draw(random, 1, max(2, 9000 // cols)), cols


def draw(random: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=random))


def view_of(shape, dtype, device, random) -> torch.Tensor:
    """Random values in rows that lie apart, between sentinels; aligned as vectors must be."""
    rows, cols = shape
    left, right = 8 * draw(random, 0, 3), 8 * draw(random, 0, 3)
    base = torch.full((rows + 2, left + cols + right), SENTINEL, dtype=dtype)
    base[1:-1, left : left + cols] = torch.randn(shape, generator=random)
    return base.to(device)[1:-1, left : left + cols]


def shard_of(name: str, shape, random) -> mk.TensorSpec:
    """A shard that begins and ends at vectors of the whole tensor."""
    row0, col0, right = draw(random, 0, 5), 8 * draw(random, 0, 3), 8 * draw(random, 0, 3)
    return mk.TensorSpec(name, shape, row0, col0, (shape[0] + row0 + 1, shape[1] + col0 + right))


def direction(kind: str, step: int) -> mk.Direction:
    # Seeds of their own make the kernels that take any mixture.
    seed, distribution = (step, "gaussian") if kind == "mixed" else (5, kind)
    return mk.Direction(seed, step, 0, distribution)


def written(seed: int, kind: str, backend: str, device: str) -> list[torch.Tensor]:
    """What a pair, a pool of slots and an accumulation leave of all memory of random tensors."""
    random = torch.Generator().manual_seed(seed)
    shapes = [random_shape(random) for _ in range(3)]
    specs = [shard_of(f"t{i}", shape, random) for i, shape in enumerate(shapes)]
    masters = [view_of(shape, torch.float32, device, random) for shape in shapes]
    slots = [
        [view_of(shape, DTYPES[draw(random, 0, 3)], device, random) for shape in shapes]
        for _ in range(5)
    ]
    pair = mk.AdapterPlan(masters, specs, slots[:2])
    pool = mk.AdapterPlan(masters, specs, slots[2:])
    halves = [view_of(shape, DTYPES[i % 3], device, random) for i, shape in enumerate(shapes)]
    accumulated = mk.AdapterPlan(halves, specs)
    for plan in (pair, pool, accumulated):
        assert plan.device_tables().num_vector == len(plan.device_tables().work)
    a, b, c = (direction(kind, step) for step in range(3))
    for update in (None, ([a], [0.5])):
        mk.perturb_into(pair, directions=[b, b], scales=[0.1, -0.1], update=update, backend=backend)
    mk.perturb_into(
        pool,
        directions=[c, b, c],
        scales=[1.0, 0.0, -2.0],
        update=([a, b], [1, 2]),
        backend=backend,
    )
    for plan in (accumulated, pair):
        mk.add_directions_(plan, directions=[a, c], coefficients=[0.25, -3], backend=backend)
    views = [*masters, *halves, *(view for slot in slots for view in slot)]
    return [(view if view._base is None else view._base).cpu() for view in views]


def assert_bits_of_cpu(seed: int, kind: str, device: str, bits) -> None:
    ours, theirs = written(seed, kind, "cuda", device), written(seed, kind, "cpu", "cpu")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(bits(a), bits(b)), (seed, i, tuple(a.shape), a.dtype)


@pytest.mark.parametrize("lanes", cuda.LANES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_and_strides(native, on_host, bits, monkeypatch, seed, kind, lanes):
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, lanes)
    assert_bits_of_cpu(seed, kind, "cpu", bits)


@pytest.mark.gpu
@pytest.mark.parametrize("lanes", cuda.LANES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "mixed"])
def test_random_shapes_and_strides_on_a_gpu(native, bits, monkeypatch, kind, lanes):
    if mk.backends()["cuda"] is not None:
        pytest.skip(mk.backends()["cuda"])
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, lanes)
    for seed in (10, 11):
        assert_bits_of_cpu(seed, kind, "cuda", bits)


@pytest.mark.parametrize(
    ("environment", "argument", "expected"),
    [
        (None, None, False),
        ("", None, False),
        ("wide", None, False),
        ("contiguous", None, True),
        ("wide", "contiguous", True),
        ("contiguous", "wide", False),
    ],
)
def test_the_kernels_get_the_lanes_asked_for(monkeypatch, environment, argument, expected):
    if environment is None:
        monkeypatch.delenv(cuda.ENVIRONMENT_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, environment)
    asked = []
    module = SimpleNamespace(
        cuda_perturb=lambda tables, scalars, seed, indices, lanes, *at: asked.append(lanes),
        cuda_add_directions=lambda tables, scalars, seed, lanes, *at: asked.append(lanes),
    )
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(module=lambda: module))
    monkeypatch.setattr(cuda, "_at", lambda device: (0, 0))
    plan = mk.AdapterPlan([torch.zeros(2, 8)], [mk.TensorSpec("t", (2, 8))], [[torch.zeros(2, 8)]])
    scalars = scalars_of(plan.device, [mk.Direction(1, 2)], [1.0])
    cuda.perturb_scalars(plan, scalars, lanes=argument)
    cuda.add_scalars_(plan, scalars, lanes=argument)
    assert asked == [expected] * 2


def test_other_lanes_are_refused(monkeypatch):
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, "narrow")
    sentence = r"MEZO_CUDA_LANES must be one of \['wide', 'contiguous'\], got 'narrow'; leave it"
    with pytest.raises(ValueError, match=sentence):
        cuda.is_contiguous(None)
    with pytest.raises(ValueError, match=r"cuda backend: lanes must be one of .* got 'narrow'; "):
        cuda.is_contiguous("narrow")
