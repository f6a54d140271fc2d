"""What we change so that SGLang runs on a CPU host, and that nothing else is changed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mezo.engines.sglang.launch import _cpu_environment, _environment

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="for hosts without an accelerator"),
]

_SCRIPT = """
import os, warnings
warnings.simplefilter("ignore")
import mezo
import torch
import torchvision  # fails on such a host until its schemas are declared
from mezo.engines.sglang.cpu_host.host import prepare_import, unpin_lora_memory

prepare_import()
prepare_import()  # idempotent
assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"

import sgl_kernel
try:
    sgl_kernel.some_kernel
except AttributeError as error:
    assert "some_kernel" in str(error)
else:
    raise AssertionError("only *_cpu names may be stood in for")
try:
    sgl_kernel.some_kernel_cpu(1)
except NotImplementedError as error:
    assert "sgl_kernel.some_kernel_cpu must be SGLang's compiled kernel" in str(error)
else:
    raise AssertionError("a stand-in must not pretend to compute")
assert not hasattr(torch.ops.sgl_kernel, "weight_packed_linear")

from sglang.srt.lora import layers
from sglang.srt.lora.backend import torch_backend
unpin_lora_memory()
unpin_lora_memory()
for module in (layers, torch_backend):
    assert module.torch.tensor([1, 2], pin_memory=True).tolist() == [1, 2]
    assert module.torch.nn is torch.nn
    with torch.device("meta"):  # still honoured by the factories of these modules
        assert module.torch.empty(2, pin_memory=True).device.type == "meta"
for request in (lambda: torch.zeros(2, pin_memory=True), lambda: torch.zeros(2).pin_memory()):
    try:
        request()
    except RuntimeError:
        continue
    raise AssertionError("pinned memory is refused everywhere else, as before")
print("fine")
"""


def test_the_three_changes_are_scoped():
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("fine\n")


def test_what_the_engines_processes_find_in_their_environment(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    before = dict(os.environ)
    with _environment(_cpu_environment({"tp_size": 2}, 3), {"OMP_NUM_THREADS"}):
        found = dict(os.environ)
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["MALLOC_TRIM_THRESHOLD_"] == str(2**30)
    assert found["MALLOC_MMAP_THRESHOLD_"] == "131072"  # the user's own value
    assert found["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    assert dict(os.environ) == before
