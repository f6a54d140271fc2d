"""What the native module is made of: no libtorch, no CUDA driver, single roundings."""

import shutil
import subprocess

import pytest

from mezo_kernels import _native


def test_build_info(native):
    info = native.build_info()
    assert set(info) == {"compiler", "isa_paths", "openmp", "cuda_archs"}
    assert "portable" in info["isa_paths"]
    assert isinstance(info["openmp"], bool)


def test_forced_paths_are_used(native, isa):
    assert native.isa() == isa


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_links_neither_torch_nor_the_cuda_driver(native):
    dynamic = subprocess.run(
        ["readelf", "--dynamic", native.__file__], check=True, capture_output=True, text=True
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    for library in needed:
        assert not library.startswith(("libtorch", "libc10", "libcuda", "libcudart")), needed


def test_the_reason_is_kept_when_the_module_does_not_load():
    assert (_native.import_error is None) == (_native._C is not None)
