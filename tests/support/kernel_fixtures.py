"""Fixtures that choose a backend, and the code path of the cpu backend.

The conftests of the kernels and of the benchmarks import them.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels import _native, directions
from mezo_kernels.backends import _best
from mezo_kernels.directions import cuda
from tests.support import cuda_on_host

__all__ = [
    "backend",
    "bits",
    "cuda_on_host_module",
    "edge_words",
    "isa",
    "isas",
    "native",
    "native_normals",
    "no_native",
    "on_host",
    "one_thread",
    "threads",
]

ISAS = ("portable", "avx2", "avx512")


@pytest.fixture
def native():
    """The native module, with the automatic code path restored afterwards."""
    if _native.import_error is not None:
        pytest.skip(f"native module: {_native.import_error}")
    module = _native.module()
    yield module
    module.set_isa("auto")


@pytest.fixture
def isas(native):
    """The code paths of the cpu backend, one after the other for one test; each is set in turn."""

    def each():
        for name in ISAS:
            try:
                native.set_isa(name)
            except RuntimeError:
                continue
            yield name

    return each


@pytest.fixture(params=ISAS)
def isa(request, native):
    """Each code path of the cpu backend in turn."""
    try:
        native.set_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this CPU or build has no {request.param}")
    return request.param


@pytest.fixture
def one_thread():
    """Small products are slow on several threads of a busy machine; `threads` asks for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=(1, 2), ids=("1thread", "2threads"))
def threads(request):
    """The number of threads of torch, and so of the cpu backend."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native_normals():
    """A function from `[N, 4]` int64 words to `[N, 4]` fp32 normals by the path in use."""

    def call(words: torch.Tensor) -> torch.Tensor:
        words32 = (words - ((words >> 31) << 32)).to(torch.int32).contiguous()
        z = torch.empty(words.shape, dtype=torch.float32)
        _native.module().normals_of_words(z.data_ptr(), words32.data_ptr(), len(words))
        return z

    return call


@pytest.fixture(scope="session")
def edge_words():
    """Words where the exact Gaussian changes branch, in every pairing of radius and angle."""
    threshold, quarter, eighth = 0xB504F300, 1 << 30, 1 << 29
    radius = [0, 1, 2, 3, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 3, 2**31 - 1, 2**31, 2**32 - 1]
    radius += [threshold + offset for offset in range(-300, 301, 4)]
    radius += [threshold - 1, threshold + 1, 2**32 - 2, 2**32 - 3, 2**32 - 2**24]
    angle = [0, 1, 2**32 - 1]
    for center in range(0, 2**32, eighth):
        angle += [(center + offset) % 2**32 for offset in (-65, -1, 0, 1, 65)]
    angle += [quarter // 3, quarter + 12345]
    grid = torch.cartesian_prod(torch.tensor(radius), torch.tensor(angle))
    return torch.cat((grid, grid.roll(7, 0)), dim=1)


@pytest.fixture(scope="session")
def bits():
    """A function from a tensor to its bits, since 0.0 == -0.0 and NaN != NaN."""

    def call(tensor: torch.Tensor) -> torch.Tensor:
        same_width = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
        return tensor.contiguous().view(same_width)

    return call


@dataclass(frozen=True)
class Backend:
    """A backend under test and the device its tensors lie on."""

    name: str
    device: str


@pytest.fixture(scope="session")
def cuda_on_host_module():
    """The CUDA kernels compiled for the host (tests/support/cuda_on_host)."""
    if not cuda_on_host.can_build():
        pytest.skip("compiling CUDA kernels for the host needs g++ and the headers of nvcc")
    return _built_for_the_host()


# A fixture that two conftests import is set up twice.
@functools.cache
def _built_for_the_host():
    # A module that is loaded needs its file no more.
    with tempfile.TemporaryDirectory() as directory:
        return cuda_on_host.build_kernels(Path(directory))


@pytest.fixture
def on_host(cuda_on_host_module, monkeypatch):
    """backend="cuda" runs the CUDA kernels on the host, on CPU tensors."""
    module = SimpleNamespace(module=lambda: cuda_on_host_module)
    monkeypatch.setattr(cuda, "_native", module)
    monkeypatch.setattr(cuda, "_at", lambda device: (0, 0))
    monkeypatch.setattr(directions, "resolve", lambda op, name, device_type: name or "cpu")
    return Backend("cuda", "cpu")


@pytest.fixture(
    params=[
        "cuda_on_host",
        "contiguous_on_host",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def backend(request, monkeypatch):
    """Each backend that keeps its tables on the device; on the host, cuda with either lanes."""
    monkeypatch.delenv(cuda.ENVIRONMENT_VARIABLE, raising=False)
    if request.param == "contiguous_on_host":
        monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, "contiguous")
    if request.param.endswith("on_host"):
        return request.getfixturevalue("on_host")
    reason = mk.backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return Backend(request.param, "cuda")


@pytest.fixture
def no_native(monkeypatch):
    """A package whose native module was never built."""
    monkeypatch.setattr(_native, "import_error", "No module named 'mezo_kernels._C'")
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.delenv("MEZO_KERNELS_BACKEND", raising=False)
    _best.cache_clear()
    yield
    _best.cache_clear()
