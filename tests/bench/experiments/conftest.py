"""The native module of the experiments, and its CUDA kernels on the host."""

import pytest

from bench.experiments import _native, device_step, lora
from tests.support import cuda_on_host


@pytest.fixture(scope="session")
def experiments_on_host(tmp_path_factory):
    """The native module; its CUDA kernels are compiled for the host (support/cuda_on_host)."""
    if not cuda_on_host.can_build():
        pytest.skip("compiling CUDA kernels for the host needs g++ and the headers of nvcc")
    return cuda_on_host.build_experiments(tmp_path_factory.mktemp("experiments_on_host"))


@pytest.fixture
def on_host(on_host, experiments_on_host, monkeypatch):
    """backend="cuda" of the experiments runs on the host, as that of the directions does."""
    monkeypatch.setattr(_native, "C", experiments_on_host)
    for module in (device_step, lora):
        monkeypatch.setattr(module, "resolve", lambda op, name, device_type: name or "cpu")
    return on_host


@pytest.fixture
def native(native, request, monkeypatch):
    """The native modules of the kernels and of the experiments, built for the test if need be."""
    if _native.C is None:
        monkeypatch.setattr(_native, "C", request.getfixturevalue("experiments_on_host"))
    return native


@pytest.fixture
def no_native(no_native, monkeypatch):
    """Neither native module was ever built."""
    monkeypatch.setattr(_native, "C", None)
