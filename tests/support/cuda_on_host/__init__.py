"""The CUDA kernels compiled for the host: shim.h says how and what that shows."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SOURCES = ("add", "expand", "perturb", "sample", "shrink")


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


def build(directory: Path) -> ModuleType:
    """Compile into ``directory`` and import; about 15 s."""
    # Not needed, and perhaps not there, where there is a GPU.
    import pybind11

    include = cuda_include_dir()
    assert include is not None
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-w"]
    # Rows of tables are read as words of another type, as CUDA allows.
    flags += ["-fno-strict-aliasing", "-fvisibility=hidden"]
    roots = (CSRC, include, pybind11.get_include(), sysconfig.get_path("include"))
    flags += [f"-I{root}" for root in roots]
    objects = []
    for name in SOURCES:
        source = CSRC / "cuda" / f"{name}.cu"
        shim = ["-include", str(HERE / "shim.h"), "-x", "c++"]
        objects.append(_compile([*flags, *shim], source, directory / f"{name}.o"))
    for source in (CSRC / "bindings" / "directions_cuda.cpp", HERE / "module.cpp"):
        objects.append(_compile(flags, source, directory / f"{source.stem}.o"))
    target = directory / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(["g++", "-shared", *objects, "-o", str(target)])
    spec = importlib.util.spec_from_file_location("cuda_on_host", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(flags: list[str], source: Path, target: Path) -> str:
    _run(["g++", *flags, "-c", str(source), "-o", str(target)])
    return str(target)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
