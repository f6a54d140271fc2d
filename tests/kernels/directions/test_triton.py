"""The triton backend gives the bits of the others: interpreted here, compiled on a GPU."""

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels.backends import _best, resolve
from tests.support.direction_cases import CASES, difference, edge_words
from tests.support.interpreted import run_interpreted

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def interpreted():
    """What the interpreter says of every case: "" where it has the reference's bits."""
    # Fan-outs overflow fp16 on purpose, and numpy says so.
    return run_interpreted("tests.support.direction_cases", "-W", "ignore::RuntimeWarning")


@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreted, name):
    assert interpreted[name] == ""


def test_the_comparison_sees_one_wrong_bit():
    right = torch.tensor([[1.0, -0.0]])
    assert difference([right], [right.clone()]) == ""
    message = difference([right], [torch.tensor([[1.0, 0.0]])])
    assert (
        message == "tensor 0 (1, 2) torch.float32: 1 of 2 differ, first (0, 1): -0.0, expected 0.0"
    )


@pytest.fixture
def compiled():
    """Skips where the kernels cannot be run compiled."""
    reason = mk.backends()["triton"]
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled(compiled, name):
    assert difference(CASES[name]("triton", "cuda"), CASES[name]("reference", "cpu")) == ""


@pytest.mark.gpu
def test_a_large_plan_on_the_gpu(compiled):
    shapes = [(16, 8192), (8192, 16), (4096, 33), (3, 70001)]
    specs = [mk.TensorSpec(f"tensor{i}", shape) for i, shape in enumerate(shapes)]
    results = []
    for backend, device in (("triton", "cuda"), ("cpu", "cpu")):
        masters = [torch.ones(shape, device=device) for shape in shapes]
        slots = [
            [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
            for _ in range(2)
        ]
        mk.perturb_into(
            masters, specs, slots, [mk.Direction(1, 2)] * 2, [1e-2, -1e-2],
            update=([mk.Direction(1, 1)], [0.1]), backend=backend,
        )  # fmt: skip
        results.append([*masters, *slots[0], *slots[1]])
    assert difference(*results) == ""


@pytest.mark.gpu
def test_the_root_of_every_radius(compiled):
    # 2**-33 to 64, all of them: the shortened root is that of sqrt.rn.
    from tests.support.triton_probes import sqrt_of

    first, last = (torch.tensor(x).view(torch.int32).item() for x in (2.0**-33, 64.0))
    for start in range(first, last, 1 << 24):
        bits = torch.arange(start, min(start + (1 << 24), last), dtype=torch.int32, device="cuda")
        x = bits.view(torch.float32)
        assert torch.equal(sqrt_of(x, exact=False), sqrt_of(x, exact=True)), hex(start)


@pytest.mark.gpu
def test_a_captured_launch_follows_its_scalars(compiled):
    from mezo_kernels.directions import triton
    from mezo_kernels.directions.scalars import scalars_of

    spec = mk.TensorSpec("t", (64, 64))
    master, slot = torch.zeros(64, 64, device="cuda"), torch.empty(64, 64, device="cuda")
    plan = mk.AdapterPlan([master], [spec], [[slot]])
    scalars = [scalars_of(plan.device, [mk.Direction(1, step)], [0.5]) for step in range(2)]
    # The first call compiles.
    triton.perturb_scalars(plan, scalars[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton.perturb_scalars(plan, scalars[0])
    scalars[0].directions.copy_(scalars[1].directions)
    graph.replay()
    z = mk.sample(spec, mk.Direction(1, 1), backend="cpu")
    assert torch.equal(slot.cpu(), 0.5 * z)


def test_edge_words_reach_every_branch():
    radius, angle = edge_words().unbind(1)
    assert {0, 2**32 - 1, 0xB504F300 - 1, 0xB504F300} <= set(radius.tolist())
    assert set((((angle + (1 << 29)) >> 30) % 4).tolist()) == {0, 1, 2, 3}


@pytest.fixture
def interpreting(monkeypatch):
    """As if triton were going to interpret; nothing imports it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("MEZO_KERNELS_BACKEND", raising=False)
    _best.cache_clear()
    yield
    _best.cache_clear()


def test_the_interpreter_is_for_cpu_tensors_and_only_when_named(interpreting):
    assert mk.backends()["triton"] is None
    assert resolve("sample", "triton", "cpu") == "triton"
    assert resolve("sample", None, "cpu") != "triton"
    # Addresses in tables: the interpreter would read a GPU's memory from the host.
    assert resolve("sample", None, "cuda") != "triton"
    with pytest.raises(RuntimeError, match="'triton' is not usable here: It does not work on cuda"):
        resolve("sample", "triton", "cuda")


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "is not installed" in mk.backends()["triton"]


def test_without_a_gpu_the_reason_names_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in mk.backends()["triton"]
    with pytest.raises(RuntimeError, match="'triton' is not usable here: No CUDA device"):
        resolve("sample", "triton", "cpu")
