"""`pytest tests/bench --benchmark-enable`: the calls of bench/directions.py, one benchmark each."""

import pytest
import torch

from bench.directions import GENERATION_ELEMENTS, Case, generation, on_isa, vector_isas
from mezo_kernels import _native

pytestmark = pytest.mark.skipif(
    _native.import_error is not None, reason="the native module is not built"
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def case(request):
    return Case("smollm2-135m", request.param)


@pytest.mark.parametrize(
    "name",
    [
        "torch_pair",
        "pair_into_slots",
        "torch_step",
        "update_and_pair",
        "add_directions",
    ],
)
def test_case(benchmark, case, name):
    benchmark.extra_info["elements"] = case.num_elements
    benchmark(getattr(case, name))


@pytest.mark.parametrize("isa", vector_isas() if _native.import_error is None else [])
def test_generation(benchmark, isa):
    benchmark.extra_info["elements"] = GENERATION_ELEMENTS
    benchmark(on_isa(isa, generation()))
