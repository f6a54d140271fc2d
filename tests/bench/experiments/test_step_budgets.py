"""What the kernel of DeviceStep compiles to, without a GPU: registers and stack."""

import pytest

from tests.support import cuda_sass

pytestmark = pytest.mark.skipif(
    cuda_sass.find_nvcc() is None or cuda_sass.find_nvdisasm() is None,
    reason="compiling and reading CUDA kernels needs nvcc and nvdisasm",
)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_registers_and_stack(arch, tmp_path):
    kernels = cuda_sass.compile_kernels(arch, tmp_path, cuda_sass.STEP)
    assert set(kernels) == {"advance"}
    kernel = kernels["advance"]
    assert kernel.registers <= 64
    assert (kernel.stack, kernel.spills) == (0, 0)
    assert kernel.count("LDL") == kernel.count("STL") == 0
