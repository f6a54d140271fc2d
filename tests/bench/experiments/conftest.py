"""The CUDA kernels of the experiments on the host, too."""

from types import SimpleNamespace

import pytest

from bench.experiments import device_step, lora
from bench.experiments.lora import cuda


@pytest.fixture
def on_host(on_host, cuda_on_host_module, monkeypatch):
    """backend="cuda" of the experiments runs on the host, too."""
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(module=lambda: cuda_on_host_module))
    for module in (device_step, lora):
        monkeypatch.setattr(module, "resolve", lambda op, name, device_type: name or "cpu")
    return on_host
