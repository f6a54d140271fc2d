"""The CUDA kernels of the experiments on the host, too."""

from types import SimpleNamespace

import pytest

from bench.experiments import lora
from bench.experiments.lora import cuda


@pytest.fixture
def on_host(on_host, cuda_on_host_module, monkeypatch):
    """backend="cuda" of perturbed_lora runs on the host, as that of the directions does."""
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(module=lambda: cuda_on_host_module))
    monkeypatch.setattr(lora, "resolve", lambda op, name, device_type: name or "cpu")
    return on_host
