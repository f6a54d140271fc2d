"""Native build of mezo_kernels._C: setuptools drives CMake and ninja; csrc/sources.txt lists what.

MEZO_SKIP_CUDA_BUILD=1 leaves the CUDA kernels out; MEZO_CUDA_ARCHS="80;90" chooses their targets.
MEZO_BUILD_EXPERIMENTS=1 also builds bench.experiments._C.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "80;90"


def is_set(variable: str) -> bool:
    """Whether an environment variable switches something on."""
    return os.environ.get(variable, "0") not in ("", "0")


def find_nvcc() -> str | None:
    """Return the nvcc to use, or None where there is none or the CUDA build is switched off."""
    if is_set("MEZO_SKIP_CUDA_BUILD"):
        return None
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(cuda_home) / "bin"))


def find_tool(name: str) -> str:
    """Return a build tool of this Python environment, activated or not, else the one on PATH."""
    own = shutil.which(name, path=str(Path(sys.executable).parent))
    found = own or shutil.which(name)
    if found is None:
        raise SystemExit(f"mezo_kernels: {name} is needed to build; run `pip install {name}`.")
    return found


class CMakeBuild(build_ext):
    """Configure once, then build what changed, under build/native-<Python tag>."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMEZO_BUILD_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DMEZO_BUILD_EXPERIMENTS={'ON' if is_set('MEZO_BUILD_EXPERIMENTS') else 'OFF'}",
        ]
        if nvcc:
            archs = os.environ.get("MEZO_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DMEZO_CUDA_ARCHS={archs}"]
        run(configure, nvcc)
        run([cmake, "--build", str(build_dir)], nvcc)


def run(command: list[str], nvcc: str | None) -> None:
    """Run a build command quietly; show its output, and a way out, when it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode == 0:
        return
    hint = (
        f" If the CUDA part is what fails (nvcc: {nvcc}), set MEZO_SKIP_CUDA_BUILD=1 to build the "
        "CPU kernels only, or CUDA_HOME and PATH to a working toolkit."
        if nvcc
        else ""
    )
    sys.stderr.write(result.stdout)
    raise SystemExit(f"mezo_kernels: '{' '.join(command)}' failed, see above.{hint}")


setup(
    ext_modules=[Extension("mezo_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
