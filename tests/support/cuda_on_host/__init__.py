"""CUDA kernels compiled for the host: shim.h says how and what that shows."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

from tests.support import native_sources

HERE = Path(__file__).parent


def cuda_include_dir() -> Path | None:
    """Where cuda_runtime.h lies, found beside nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next((line for line in dry_run.splitlines() if line.startswith("#$ TOP=")), None)
    if top is None:
        return None
    include = Path(top.removeprefix("#$ TOP=")) / "include"
    return include if (include / "cuda_runtime.h").exists() else None


def can_build() -> bool:
    """Whether there is what `build` needs."""
    return cuda_include_dir() is not None and shutil.which("g++") is not None


def build_kernels(directory: Path) -> ModuleType:
    """Compile the CUDA half of mezo_kernels._C into ``directory`` and import it."""
    sources = [*native_sources.paths(native_sources.CSRC, "cuda"), HERE / "module.cpp"]
    return _build(directory, "cuda_on_host", sources)


def build_experiments(directory: Path) -> ModuleType:
    """Compile bench.experiments._C into ``directory`` and import it."""
    sources = native_sources.paths(native_sources.EXPERIMENTS, "always", "cuda")
    return _build(directory, "bench.experiments._C", sources)


def _build(directory: Path, name: str, sources: list[Path]) -> ModuleType:
    """About 15 s."""
    # Not needed, and perhaps not there, where there is a GPU.
    import pybind11

    include = cuda_include_dir()
    assert include is not None
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-w"]
    # Rows of tables are read as words of another type, as CUDA allows.
    flags += ["-fno-strict-aliasing", "-fvisibility=hidden", "-DMEZO_CUDA"]
    roots = (native_sources.CSRC, include, pybind11.get_include(), sysconfig.get_path("include"))
    flags += [f"-I{root}" for root in roots]
    shim = ["-include", str(HERE / "shim.h"), "-x", "c++"]
    objects = []
    for source in sources:
        target = directory / f"{source.name}.o"
        objects.append(str(target))
        extra = shim if source.suffix == ".cu" else []
        _run(["g++", *flags, *extra, "-c", str(source), "-o", str(target)])
    target = directory / f"{name.split('.')[-1]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(["g++", "-shared", *objects, "-o", str(target)])
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
