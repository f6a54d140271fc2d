"""What a box is: printed first, so that a failure later can be explained."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

COMMANDS = (
    "uname -a",
    "ldd --version",
    "gcc --version",
    "lscpu",
    "df -h /tmp /dev/shm",
    "nvidia-smi --query-gpu=name,compute_cap,driver_version,clocks.sm,clocks.max.sm,clocks.mem,"
    "power.limit,memory.total,memory.used --format=csv",
    "nvcc --version",
)
PACKAGES = "torch triton transformers tokenizers setuptools pybind11 cmake ninja pytest numpy"


def output(command: str) -> str:
    """The first lines of what a command prints; the reason where it does not run."""
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command.split()[0]}: {error}"
    lines = (done.stdout + done.stderr).splitlines()
    wanted = [line for line in lines if "lscpu" not in command or "Model name" in line]
    return "\n".join(wanted[:4])


def versions() -> str:
    from importlib import metadata

    found = []
    for name in f"{PACKAGES} platformdirs peft psutil scipy sglang pytest-xdist".split():
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)


def triton_key() -> str:
    """A compiled kernel is found under a key that has this in it."""
    from triton.runtime.cache import triton_key

    return f"triton key {hashlib.sha256(triton_key().encode()).hexdigest()[:16]}"


def device() -> str:
    import torch

    return str(torch.cuda.get_device_properties(0))


def headers() -> str:
    include = sysconfig.get_path("include")
    return f"{include}: Python.h {'is' if Path(include, 'Python.h').exists() else 'is NOT'} there"


def cuda_home() -> str:
    home = os.environ.get("CUDA_HOME", "")
    libraries = sorted(str(path) for path in Path(home, "lib64").glob("libcudart.so*"))
    return f"CUDA_HOME {home}, {libraries or 'NO libcudart.so'}"


def main() -> None:
    print(sys.version.replace("\n", " "), os.cpu_count(), "cores")
    print(
        "on PATH:",
        {n: shutil.which(n) for n in ["git", "cmake", "ninja", "compute-sanitizer", "ncu"]},
    )
    for command in COMMANDS:
        print(output(command))
    questions: tuple[Callable[[], str], ...] = (cuda_home, headers, versions, triton_key, device)
    for question in questions:
        try:
            print(question())
        # Each answer is for itself.
        except Exception as error:
            print(f"{question.__name__}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
