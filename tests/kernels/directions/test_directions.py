"""What the calls mean: shards, order of directions, updates, copies, plans."""

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels.directions.fp32 import fma


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend that works without a GPU."""
    if mk.backends()[request.param] is not None:
        pytest.skip("native module")
    return request.param


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_concatenated_shards_are_the_whole(backend, distribution, parts, axis):
    shape = (37, 210)
    direction = mk.Direction(8, 1, 0, distribution)
    whole = mk.sample(mk.TensorSpec("w", shape), direction, backend=backend)
    shards, start = [], 0
    for part in torch.empty(shape).tensor_split(parts, axis):
        row0, col0 = (start, 0) if axis == 0 else (0, start)
        spec = mk.TensorSpec("w", tuple(part.shape), row0, col0, shape)
        shards.append(mk.sample(spec, direction, backend=backend))
        start += part.shape[axis]
    assert torch.equal(torch.cat(shards, axis), whole)


def test_one_call_equals_one_call_per_direction(backend):
    shape = (19, 45)
    spec = mk.TensorSpec("t", shape)
    directions = [mk.Direction(1, step, step % 2) for step in range(5)]
    coefficients = [0.3, -0.7, 1e-4, 2.0, -1e-3]
    together, apart = torch.ones(shape), torch.ones(shape)
    mk.add_directions_([together], [spec], directions, coefficients, backend=backend)
    for direction, coefficient in zip(directions, coefficients, strict=True):
        mk.add_directions_([apart], [spec], [direction], [coefficient], backend=backend)
    assert torch.equal(together, apart)
    backwards = torch.ones(shape)
    mk.add_directions_([backwards], [spec], directions[::-1], coefficients[::-1], backend=backend)
    assert not torch.equal(together, backwards)


def test_add_directions_is_fma_of_z(backend):
    shape = (19, 45)
    spec, direction = mk.TensorSpec("t", shape), mk.Direction(1, 2)
    z = mk.sample(spec, direction, backend=backend)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theta = start.clone()
    # 0.1 is not an fp32 number: it is rounded to one, once.
    mk.add_directions_([theta], [spec], [direction], [0.1], backend=backend)
    assert torch.equal(theta, fma(torch.tensor(0.1), z, start))


def test_low_precision_is_rounded_once_over_all_directions(backend):
    shape = (19, 45)
    spec = mk.TensorSpec("t", shape)
    directions = [mk.Direction(1, step) for step in range(64)]
    coefficients = [1e-3] * 64
    for dtype in (torch.bfloat16, torch.float16):
        low, high = torch.ones(shape, dtype=dtype), torch.ones(shape)
        mk.add_directions_([low], [spec], directions, coefficients, backend=backend)
        mk.add_directions_([high], [spec], directions, coefficients, backend=backend)
        assert torch.equal(low, high.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_perturb_into_is_update_then_fma(backend, dtype):
    shapes = [(8, 40), (40, 8)]
    specs = [mk.TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)]
    masters = [torch.full(shape, 0.3) for shape in shapes]
    updated = [master.clone() for master in masters]
    outputs = [[torch.empty(shape, dtype=dtype) for shape in shapes] for _ in range(3)]
    previous, following = mk.Direction(4, 0), mk.Direction(4, 1)
    plan = mk.AdapterPlan(masters, specs, outputs)
    mk.perturb_into(
        plan,
        directions=[following, following, following],
        scales=[1e-2, -1e-2, 0.0],
        update=([previous], [-0.05]),
        backend=backend,
    )
    mk.add_directions_(updated, specs, [previous], [-0.05], backend=backend)
    for i, spec in enumerate(specs):
        z = mk.sample(spec, following, backend=backend)
        assert torch.equal(masters[i], updated[i])
        for slot, sign in zip(outputs, (1, -1), strict=False):
            expected = fma(torch.tensor(sign * 1e-2), z, updated[i]).to(dtype)
            assert torch.equal(slot[i], expected)
        assert torch.equal(outputs[2][i], updated[i].to(dtype))


def test_masters_are_unchanged_without_an_update(backend):
    master = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    before = master.clone()
    out = torch.empty(8, 40)
    mk.perturb_into(
        [master], [mk.TensorSpec("t", (8, 40))], [[out]], [mk.Direction(0, 0)], [1.0],
        backend=backend,
    )  # fmt: skip
    assert torch.equal(master, before)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-60])
def test_scale_zero_copies_bits(backend, scale, bits):
    # fma(0, z, -0.0) would be +0.0; a scale that rounds to 0 in fp32 is 0 as well.
    master = torch.tensor([[-0.0, 0.0, 1.0, 1e-45, float("inf")]])
    out = torch.empty(1, 5)
    mk.perturb_into(
        [master], [mk.TensorSpec("t", (1, 5))], [[out]], [mk.Direction(0, 0)], [scale],
        backend=backend,
    )  # fmt: skip
    assert torch.equal(bits(out), bits(master))


def test_a_plan_is_used_again_and_follows_its_tensors(backend):
    spec = mk.TensorSpec("t", (8, 40))
    master, outputs = torch.zeros(8, 40), [[torch.empty(8, 40)], [torch.empty(8, 40)]]
    plan = mk.AdapterPlan([master], [spec], outputs)
    for step in range(3):
        direction = mk.Direction(0, step)
        mk.add_directions_(plan, directions=[direction], coefficients=[1.0], backend=backend)
        master.mul_(0.5)
        pair = [direction, direction]
        mk.perturb_into(plan, directions=pair, scales=[0.25, -0.25], backend=backend)
        z = mk.sample(spec, direction, backend=backend)
        assert torch.equal(outputs[0][0], fma(0.25, z, master))
        assert torch.equal(outputs[1][0], fma(-0.25, z, master))


def test_parameters_that_require_grad_are_written(backend):
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    specs = [mk.TensorSpec("t", (4, 4))]
    mk.add_directions_([parameter], specs, [mk.Direction(0, 0)], [1.0], backend=backend)
    assert torch.equal(parameter.detach(), mk.sample(specs[0], mk.Direction(0, 0)))


def test_no_tensors_and_no_directions_are_no_ops(backend):
    tensor = torch.tensor([[-0.0, 1.0]])
    mk.add_directions_([], [], [mk.Direction(0, 0)], [1.0], backend=backend)
    mk.add_directions_([tensor], [mk.TensorSpec("t", (1, 2))], backend=backend)
    mk.perturb_into([tensor], [mk.TensorSpec("t", (1, 2))], [], backend=backend)
    assert tensor.tolist() == [[0.0, 1.0]]
    assert mk.sample(mk.TensorSpec("t", (0, 3)), mk.Direction(0, 0), backend=backend).numel() == 0


def test_numpy_and_torch_scalars_are_coefficients(backend):
    spec, direction = mk.TensorSpec("t", (4, 4)), mk.Direction(0, 0)
    results = []
    for coefficient in (0.5, torch.tensor(0.5), torch.tensor(0.5).numpy()):
        tensor = torch.zeros(4, 4)
        mk.add_directions_([tensor], [spec], [direction], [coefficient], backend=backend)
        results.append(tensor)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
