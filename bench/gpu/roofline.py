"""The limits of this GPU, measured: bench/gpu/roofline.cu, built with nvcc when it is asked for."""

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.timing import Call, CudaEvents, interleave

SOURCE = Path(__file__).parent / "roofline.cu"
# Large against any L2 cache.
ELEMENTS = 1 << 28
THREADS, CHAINS, ROUNDS = 256, 8, 4096


@dataclass(frozen=True)
class Roofline:
    """Bytes per second of the copies by bytes per element, and wide multiplies per second."""

    copy: float
    patterns: dict[int, float]
    wide_multiplies: float
    clock_hz: float
    multiprocessors: int


class Library:
    """A .cu file that nvcc compiles for the device at hand while the caller does other things."""

    def __init__(self, source: Path) -> None:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            raise RuntimeError(f"{source.name} needs nvcc, which is not on PATH; add its folder.")
        major, minor = torch.cuda.get_device_capability()
        self._target = Path(tempfile.mkdtemp()) / f"{source.stem}.so"
        command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared"]
        command += ["-Xcompiler", "-fPIC", "-o", str(self._target), str(source)]
        self._compiling = subprocess.Popen(command)

    def load(self) -> ctypes.CDLL:
        """The library, once it is compiled; about 5 s."""
        if self._compiling.wait() != 0:
            raise RuntimeError(f"nvcc failed on {self._target.stem}.cu; see what it printed.")
        return ctypes.CDLL(str(self._target))


def build() -> ctypes.CDLL:
    library = Library(SOURCE).load()
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.wide_multiplies.argtypes = [pointer, ctypes.c_int, ctypes.c_int, pointer]
    library.fan_out.argtypes = [pointer, pointer, pointer, size, ctypes.c_int, pointer]
    library.in_place.argtypes = [pointer, size, pointer]
    return library


def measure(rounds: int = 20) -> Roofline:
    """Medians of ``rounds``."""
    library = build()
    stream = torch.cuda.current_stream().cuda_stream
    # As weights are: zeros take less power to move, and so may be moved faster.
    master = torch.randn(ELEMENTS, device="cuda")
    slots = [torch.empty(ELEMENTS, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    addresses = (master.data_ptr(), slots[0].data_ptr(), slots[1].data_ptr())
    properties = torch.cuda.get_device_properties(0)
    blocks = 8 * properties.multi_processor_count
    links = blocks * THREADS * CHAINS * ROUNDS

    def checked(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"The roofline kernel failed with CUDA error {status}.")

    multiply = seconds(
        lambda: checked(library.wide_multiplies(addresses[0], blocks, ROUNDS, stream)), rounds
    )
    in_place = seconds(lambda: checked(library.in_place(addresses[0], ELEMENTS, stream)), rounds)
    two = seconds(lambda: checked(library.fan_out(*addresses, ELEMENTS, 0, stream)), rounds)
    three = seconds(lambda: checked(library.fan_out(*addresses, ELEMENTS, 1, stream)), rounds)
    return Roofline(
        copy=copy_bandwidth(rounds),
        patterns={8: 8 * ELEMENTS / min(two, in_place), 12: 12 * ELEMENTS / three},
        wide_multiplies=links / multiply,
        clock_hz=max_clock(),
        multiprocessors=properties.multi_processor_count,
    )


def copy_bandwidth(rounds: int = 20) -> float:
    """Bytes per second of torch's copy of 1 GiB of random data, read and written; needs no nvcc."""
    source = torch.randn(ELEMENTS, device="cuda")
    target = torch.empty_like(source)
    return 8 * ELEMENTS / seconds(lambda: target.copy_(source), rounds)


def max_clock() -> float:
    """The highest SM clock in Hz, as nvidia-smi reports it; NaN where it does not."""
    command = [
        "nvidia-smi",
        "--query-gpu=clocks.max.sm",
        "--format=csv,noheader,nounits",
        "-i",
        "0",
    ]
    try:
        text = subprocess.run(command, capture_output=True, text=True).stdout
        return 1e6 * float(text.split()[0])
    except (OSError, IndexError, ValueError):
        return float("nan")


def seconds(call: Call, rounds: int) -> float:
    """Median time of one call on the device; the host has launched it when the time begins."""
    return interleave({"": call}, rounds, stopwatch=CudaEvents())[""].p50
