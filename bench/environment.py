"""What a number depends on: date, commit, versions, CPU or GPU."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone

import torch

SMI_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def environment(device: str) -> dict[str, object]:
    """The facts of a result on ``device``, "cpu" or "cuda"."""
    common = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return common | _cpu() if device == "cpu" else _gpu() | common


def folder_name(device: str) -> str:
    """The folder of the results under bench/results: "cpu", or the GPU's name."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")


def facts_line(facts: dict[str, object]) -> str:
    """The facts in a line, of a CPU or of a GPU."""
    keys = [key for key in (*_CPU_KEYS, *_GPU_KEYS) if key in facts]
    words = [f"{key} {facts[key]}" for key in keys]
    if "cpu_flags" in facts:
        words.append(f"flags {' '.join(map(str, facts['cpu_flags']))}")
    return f"Measured with: {', '.join(words)}."


_CPU_KEYS = (
    "date",
    "commit",
    "python",
    "torch",
    "torch_cpu_capability",
    "cpu",
    "cores",
    "threads",
    "load_average",
)
_GPU_KEYS = ("device", "multiprocessors", "l2_bytes", "cuda", SMI_QUERY)


def _cpu() -> dict[str, object]:
    return {
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": _cpu_field("model name") or platform.processor(),
        "cpu_flags": sorted(
            flag
            for flag in _cpu_field("flags").split()
            if flag.startswith(("avx", "fma", "f16c", "amx"))
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        SMI_QUERY: _output(
            "nvidia-smi", f"--query-gpu={SMI_QUERY}", "--format=csv,noheader", "-i", "0"
        ),
    }


def commit() -> str:
    """The commit: git's, else MEZO_COMMIT, which a copy without .git is told."""
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("MEZO_COMMIT") or "unknown"
    is_dirty = _git("status", "--porcelain", "--", "csrc", "mezo_kernels", "mezo", "bench/*.py")
    return f"{head}-dirty" if is_dirty else head


def _git(*arguments: str) -> str:
    return _output("git", *arguments)


def _output(*command: str) -> str:
    """What a program prints; nothing where it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _cpu_field(name: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return ""
