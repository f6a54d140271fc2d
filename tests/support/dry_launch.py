"""Launches of Triton kernels as a GPU would get them, compiled and not run.

A launch derives more than its kernel's source says: which sizes are 1 or divisible by 16, which
pointers are aligned, which constants it passes. Ahead-of-time compilation has to guess that; here
the launching code itself runs, on CPU tensors, up to the call of the driver.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.support.aot import Compiled, count, of_kernel

# The package has a function of the module's name.
_BACKENDS = importlib.import_module("mezo_kernels.backends")

# Shared memory that a block may have, in bytes.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}


@dataclass(frozen=True)
class Launch:
    """A kernel as one launch compiled it."""

    kernel: Compiled
    num_warps: int
    grid: tuple[int, ...]

    def __str__(self) -> str:
        k = self.kernel
        return (
            f"{k.name} for sm_{k.arch}: {self.num_warps} warps, {k.registers} registers, stack "
            f"{k.stack_bytes}, shared {k.shared_bytes}, {k.count('LDL|STL')} LDL and STL"
        )


class _Driver:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # Part of the key of triton's cache of compiled kernels.
        return f"dry sm_{self._target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def dry_launches(arch: int = 90):
    """Let the triton backend accept CPU tensors and compile its launches; yields their list."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled = of_kernel(kernel, self.__name__, arch)
        launches.append(Launch(compiled, kernel.metadata.num_warps, tuple(grid)))
        return kernel

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(_BACKENDS, "_is_interpreting", return_value=True),
        ):
            yield launches
    finally:
        triton.runtime.driver._active = before


def check_launches(launches, arch, expected, stack_bytes=0):
    """All kernels expected, within what a block may have there; no spills in loops."""
    assert {launch.kernel.name for launch in launches} == expected
    for launch in launches:
        kernel = launch.kernel
        assert kernel.stack_bytes <= stack_bytes, launch
        assert not any(count(body, "LDL|STL") for body in kernel.loops), launch
        assert kernel.shared_bytes <= SHARED_LIMIT[arch], launch
        assert kernel.registers * 32 * launch.num_warps <= 65536, launch
        assert all(0 < size <= 65535 for size in launch.grid[1:]), launch
