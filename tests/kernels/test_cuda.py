"""The cuda backend gives the bits of the cpu backend."""

import pytest
import torch

import mezo_kernels as mk

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((40, 333), (333, 8), (1030, 33), (1, 5), (7, 1), (0, 4))


@pytest.fixture(autouse=True)
def _needs_cuda(native):
    reason = mk.backends()["cuda"]
    if reason is not None:
        pytest.skip(reason)


def spec_of(i: int, shape: tuple[int, int], is_shard: bool) -> mk.TensorSpec:
    if not is_shard:
        return mk.TensorSpec(f"tensor{i}", shape)
    return mk.TensorSpec(f"tensor{i}", shape, 3, 5 + i, (shape[0] + 9, shape[1] + 21))


def padded(shape, dtype, device) -> torch.Tensor:
    base = torch.full((shape[0] + 2, shape[1] + 5), 7.0, dtype=dtype, device=device)
    return base[1:-1, 3:-2]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096)], ids=str)
def test_sample(bits, shape, distribution):
    spec = spec_of(0, shape, True)
    direction = mk.Direction(2**63 + 5, 9, 3, distribution)
    z = mk.sample(spec, direction, backend="cuda", device="cuda")
    assert torch.equal(bits(z.cpu()), bits(mk.sample(spec, direction, backend="cpu")))


@pytest.mark.parametrize("is_shard", [False, True], ids=["whole", "shard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_directions_and_perturb_into(bits, dtype, is_shard):
    first, second = mk.Direction(1, 2, 3), mk.Direction(1, 2, 3, "rademacher")
    specs = [spec_of(i, shape, is_shard) for i, shape in enumerate(SHAPES)]
    results = []
    for backend, device in (("cpu", "cpu"), ("cuda", "cuda")):
        tensors = [padded(shape, dtype, device) for shape in SHAPES]
        mk.add_directions_(tensors, specs, [first, second], [0.1, -3e-3], backend=backend)
        masters = [padded(shape, torch.float32, device) for shape in SHAPES]
        outputs = [[padded(shape, dtype, device) for shape in SHAPES] for _ in range(4)]
        plan = mk.AdapterPlan(masters, specs, outputs)
        mk.perturb_into(
            plan,
            directions=[first, first, second, first],
            scales=[1e-2, -1e-2, 0.5, 0.0],
            update=([second, first], [0.1, 0.2]),
            backend=backend,
        )
        everything = [*tensors, *masters, *(t for slot in outputs for t in slot)]
        results.append([tensor._base.cpu() for tensor in everything])
    for i, (cpu, cuda) in enumerate(zip(*results, strict=True)):
        assert torch.equal(bits(cuda), bits(cpu)), i
