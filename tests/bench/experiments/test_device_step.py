"""DeviceStep equals the same steps with scalars on the host, bit for bit."""

import math

import pytest
import torch

import mezo_kernels as mk
from bench.experiments.device_step import DeviceStep
from mezo.optim.estimate import clip_projected_grad, projected_grad
from mezo.optim.sgd import update_coefficient

pytestmark = pytest.mark.proof

LR, EPS, CLIP, SEED = 1e-3, 1e-2, 0.75, 2**63 + 11
SHAPES = ((8, 24), (24, 8), (3, 5))
DISTRIBUTIONS = ("gaussian", "rademacher")


class Adapter:
    """Masters and 2 n bf16 slots, with a quadratic as the loss of a slot."""

    def __init__(self, device: str, num_directions: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.masters = [torch.randn(s, generator=generator).to(device) for s in SHAPES]
        self.slots = [
            [torch.empty(s, dtype=torch.bfloat16, device=device) for s in SHAPES]
            for _ in range(2 * num_directions)
        ]
        specs = [mk.TensorSpec(f"step{i}", s) for i, s in enumerate(SHAPES)]
        self.plan = mk.AdapterPlan(self.masters, specs, self.slots)
        # Sums of integers are exact, so the order in which a device adds them does not matter.
        self.targets = [torch.randint(-8, 9, s, generator=generator).to(device) for s in SHAPES]

    def losses(self) -> torch.Tensor:
        """[2, n] float64: the distance of each slot to the targets, in units of 2^-10."""
        total = torch.stack(
            [
                sum(
                    ((slot.double() - target) * 1024).round().square().sum()
                    for slot, target in zip(tensors, self.targets, strict=True)
                )
                for tensors in self.slots
            ]
        )
        return (total / 2**20).view(-1, 2).T


def host_steps(adapter, backend, *, num_directions, distribution, num_steps, clip, bad=()):
    """MeZO with host scalars as `mezo.core` runs it; returns the coefficients of each step."""
    pending, history = None, []
    for step in range(num_steps):
        now = [mk.Direction(SEED, step, k, distribution) for k in range(num_directions)]
        mk.perturb_into(
            adapter.plan,
            directions=[d for d in now for _ in (0, 1)],
            scales=[EPS, -EPS] * num_directions,
            update=pending,
            backend=backend,
        )
        losses = adapter.losses()
        if step in bad:
            losses[0, -1] = math.nan
        plus, minus = losses.tolist()
        pending = None
        if losses.isfinite().all():
            grads = [
                clip_projected_grad(projected_grad(p, m, EPS), clip)
                for p, m in zip(plus, minus, strict=True)
            ]
            coefficients = [update_coefficient(g, LR, num_directions) for g in grads]
            pending = (now, coefficients)
            history.append(coefficients)
    if pending is not None:
        mk.add_directions_(
            adapter.plan, directions=pending[0], coefficients=pending[1], backend=backend
        )
    return history


def step_on_device(adapter, state, backend, *, is_bad=False):
    state.perturb(backend=backend)
    state.losses.copy_(adapter.losses())
    if is_bad:
        state.losses[0, -1] = math.nan
    state.advance_()


def make_state(adapter, num_directions, distribution="gaussian", **overrides):
    settings = {"lr": LR, "eps": EPS, "clip": CLIP} | overrides
    return DeviceStep(
        adapter.plan,
        seed=SEED,
        num_directions=num_directions,
        distribution=distribution,
        **settings,
    )


def assert_same_tensors(ours, theirs, bits):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a.cpu()), bits(b.cpu()))


@pytest.fixture(params=["reference", "cpu"])
def host_backend(request):
    """With "reference" the scalars advance in PyTorch, as without the native module."""
    if mk.backends()[request.param] is not None:
        pytest.skip("native module")
    if request.param == "reference":
        request.getfixturevalue("no_native")
    else:
        request.getfixturevalue("native")
    return request.param


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["no clip", "clip"])
def test_fifty_steps_equal_host_scalars(host_backend, bits, num_directions, distribution, clip):
    # The reference is slow; the step that is skipped is among the first ten.
    num_steps = 10 if host_backend == "reference" and num_directions > 1 else 50
    ours, theirs = Adapter("cpu", num_directions), Adapter("cpu", num_directions)
    state = make_state(ours, num_directions, distribution, clip=clip)
    bad = (7, 31)
    for step in range(num_steps):
        assert int(state.step) == step
        step_on_device(ours, state, host_backend, is_bad=step in bad)
    state.apply_update_(backend=host_backend)
    history = host_steps(
        theirs,
        host_backend,
        num_directions=num_directions,
        distribution=distribution,
        num_steps=num_steps,
        clip=clip,
        bad=bad,
    )
    assert len(history) == num_steps - sum(step < num_steps for step in bad)
    assert torch.equal(state.coefficients, torch.tensor(history[-1]))
    assert_same_tensors(ours.masters, theirs.masters, bits)
    for mine, other in zip(ours.slots, theirs.slots, strict=True):
        assert_same_tensors(mine, other, bits)
    # The quadratic goes down, so there is something to compare.
    start = Adapter("cpu", num_directions)
    make_state(start, num_directions, clip=clip).perturb()
    assert ours.losses().mean() < start.losses().mean()


def test_steps_on_each_device_backend_equal_host_scalars(backend, native, bits):
    ours, theirs = Adapter(backend.device, 2), Adapter("cpu", 2)
    state = make_state(ours, 2)
    for step in range(10):
        step_on_device(ours, state, backend.name, is_bad=step == 3)
    state.apply_update_(backend=backend.name)
    host_steps(
        theirs,
        "cpu",
        num_directions=2,
        distribution="gaussian",
        num_steps=10,
        clip=CLIP,
        bad=(3,),
    )
    assert_same_tensors(ours.masters, theirs.masters, bits)


@pytest.mark.gpu
@pytest.mark.parametrize("num_directions", [1, 2])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_graph_replays_equal_eager_host_scalars(native, bits, name, num_directions):
    if mk.backends()[name] is not None:
        pytest.skip(mk.backends()[name])
    ours, theirs = Adapter("cuda", num_directions), Adapter("cuda", num_directions)
    state = make_state(ours, num_directions)
    # Two steps outside of the graph: kernels load, and the allocator of the losses warms up.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step_on_device(ours, state, name)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_on_device(ours, state, name)
    for _ in range(10):
        graph.replay()
    assert int(state.step) == 12
    state.apply_update_(backend=name)
    host_steps(
        theirs,
        name,
        num_directions=num_directions,
        distribution="gaussian",
        num_steps=12,
        clip=CLIP,
    )
    assert_same_tensors(ours.masters, theirs.masters, bits)
    for mine, other in zip(ours.slots, theirs.slots, strict=True):
        assert_same_tensors(mine, other, bits)


def test_an_update_is_used_up_by_whatever_applies_it(host_backend, bits):
    adapter = Adapter("cpu", 1)
    state = make_state(adapter, 1)
    step_on_device(adapter, state, host_backend)
    before = [m.clone() for m in adapter.masters]
    state.apply_update_(backend=host_backend)
    once = [m.clone() for m in adapter.masters]
    assert not torch.equal(before[0], once[0])
    state.apply_update_(backend=host_backend)
    state.perturb(backend=host_backend)
    state.perturb(backend=host_backend)
    assert_same_tensors(adapter.masters, once, bits)


BAD_LOSSES = {
    "nan": [[math.nan, 1.0], [0.0, 0.0]],
    "inf": [[1.0, 1.0], [0.0, math.inf]],
    "-inf": [[1.0, -math.inf], [0.0, 0.0]],
    "coefficient beyond fp32": [[1e300, 0.0], [0.0, 0.0]],
}


def advance_by(path, state, request):
    """Advance through PyTorch, the host code, or the CUDA kernel on the host."""
    if path == "torch":
        state._advance_in_torch()
    elif path == "native":
        state.advance_()
    else:
        buffers = (state.scalars.directions, state.scalars.factors, state.scalars.num_updates)
        buffers += (state.projected_grads, state.losses, state._settings)
        fields = (*(b.data_ptr() for b in buffers), state.num_directions)
        request.getfixturevalue("experiments_on_host").cuda_advance(fields, 0, 0)


@pytest.mark.parametrize("path", ["torch", "native", "cuda_on_host"])
@pytest.mark.parametrize("case", BAD_LOSSES)
def test_a_bad_step_leaves_no_update_and_moves_on(path, case, native, request):
    state = make_state(Adapter("cpu", 2), 2, clip=None)
    state.losses.copy_(torch.tensor(BAD_LOSSES[case], dtype=torch.float64))
    advance_by(path, state, request)
    assert int(state.scalars.num_updates) == 0
    assert int(state.step) == 1
    state.losses.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    advance_by(path, state, request)
    assert int(state.scalars.num_updates) == 2
    # The update belongs to the step that was just run, the slots to the next one.
    assert state.scalars.directions[:, 2].tolist() == [1, 1, 2, 2]
    assert state.scalars.directions[:, 3].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("path", ["torch", "native", "cuda_on_host"])
def test_scalars_equal_those_of_the_host(path, native, request):
    n = 500
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-30, 30, (2, n), generator=generator)
    losses = torch.randn(2, n, generator=generator, dtype=torch.float64) * 2.0**exponents
    master = torch.zeros(1, 1)
    slots = [[torch.zeros(1, 1)] for _ in range(2 * n)]
    plan = mk.AdapterPlan([master], [mk.TensorSpec("t", (1, 1))], slots)
    for clip in (None, 3.0):
        state = DeviceStep(plan, seed=1, num_directions=n, lr=0.7, eps=3e-4, clip=clip)
        state.losses.copy_(losses)
        advance_by(path, state, request)
        pairs = zip(*losses.tolist(), strict=True)
        grads = [clip_projected_grad(projected_grad(p, m, 3e-4), clip) for p, m in pairs]
        assert state.projected_grads.tolist() == grads
        coefficients = torch.tensor([update_coefficient(g, 0.7, n) for g in grads])
        assert torch.equal(state.coefficients, coefficients)
        assert int(state.scalars.num_updates) == n


def test_settings_hold_from_the_next_call_on(native, bits):
    adapter = Adapter("cpu", 1)
    state = make_state(adapter, 1)
    state.set(lr=0.5, eps=0.25, clip=math.inf)
    state.perturb()
    expected = Adapter("cpu", 1)
    pair = [mk.Direction(SEED, 0)] * 2
    mk.perturb_into(expected.plan, directions=pair, scales=[0.25, -0.25])
    for mine, other in zip(adapter.slots, expected.slots, strict=True):
        assert_same_tensors(mine, other, bits)
    state.losses.copy_(torch.tensor([[9.0], [1.0]]))
    state.advance_()
    assert state.projected_grads.tolist() == [16.0]
    assert state.coefficients.tolist() == [-8.0]


def test_bad_arguments():
    adapter = Adapter("cpu", 2)
    for num_directions in (0, 1, 4):
        with pytest.raises(ValueError, match="half the plan's slots, got"):
            make_state(adapter, num_directions)
    state = make_state(adapter, 2)
    for setting, value in (("lr", math.inf), ("eps", 0.0), ("eps", 1e-42), ("clip", 0.0)):
        with pytest.raises(ValueError, match=f"DeviceStep: {setting} must be"):
            state.set(**{setting: value})
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'fast'"):
        state.perturb(backend="fast")
