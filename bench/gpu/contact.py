"""The three calls on a GPU box: what runs, in which order, for how long. See docs/gpu.md.

`bench/gpu/contact.sh 1|2|3` starts this. Nothing is imported here but Python's own library, so that
what is missing on a box is a failed stage and no more.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu import verdict
from bench.gpu.places import ROOT, SHIM, SITE, TRITON_CACHE, WHEELS
from bench.gpu.stages import Call, Stage

LIMITS = {1: 240.0, 2: 200.0, 3: 285.0}
# Of the limit and of the stages on a host without a GPU, which has few cores and builds for one.
DRY_FACTOR = 3.0
SHAPES = ("opt-1.3b", "opt-13b", "llama-3.1-8b")
USABLE = """
import mezo_kernels
from bench.experiments import _native
reasons = mezo_kernels.backends() | {"experiments": _native.reason_against_cuda()}
print(reasons)
raise SystemExit(any(reasons[name] for name in WANTED))
"""
BUILD = """
MEZO_BUILD_EXPERIMENTS=1 "$0" setup.py -q build_ext --inplace && exit
echo "setup.py failed; building with nvcc and g++ only"
PYTHON=$0 exec bench/build_plain.sh --experiments
"""
# Few tests, of our own kernels: under the sanitizer each takes seconds.
SANITIZED = "cuda and not on_host and not triton and (slots_of_sglang or several_directions)"


@dataclass(frozen=True)
class Host:
    """What the stages of a call depend on.

    Args:
        python: the interpreter of all stages.
        out: the folder of the call.
        dry: whether this host has no GPU, and each stage does what it can without one.
    """

    python: str
    out: Path
    dry: bool

    def module(self, name: str, *arguments: str) -> list[str]:
        return [self.python, "-m", name, *arguments]

    def question(self, name: str, *arguments: str) -> list[str]:
        """A module of bench/ that measures; without a GPU it lists its cases."""
        if self.dry:
            return self.module(name, "--dry-run")
        return self.module(name, "--device", "cuda", "--out", str(self.out), *arguments)


def build(host: Host) -> list[Stage]:
    wanted = ["cpu"] if host.dry else ["cpu", "cuda", "triton", "experiments"]
    return [
        Stage("build", 70, ["bash", "-c", BUILD, host.python]),
        Stage("usable", 20, [host.python, "-c", f"WANTED = {wanted}{USABLE}"], needs=("build",)),
    ]


def pytest_of(host: Host, *arguments: str) -> list[str]:
    """The tests that need a GPU; without one they are collected only."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "--continue-on-collection-errors"]
    options += ["-o", "addopts=-rfE --strict-markers --import-mode=importlib"]
    if host.dry:
        options.append("--collect-only")
    if importlib.util.find_spec("pytest_timeout") and not host.dry:
        options += ["--timeout", "90"]
    return host.module("pytest", *options, *arguments)


def tests(host: Host) -> list[Stage]:
    # tests/conftest.py imports transformers and mezo: conftests above these folders are not read.
    kernels = ["-m", "gpu", "--confcutdir=tests/kernels", "tests/kernels"]
    experiments = [
        "-m",
        "gpu and not sglang",
        "--confcutdir=tests/bench",
        "tests/bench/experiments",
    ]
    parallel = [] if host.dry or not importlib.util.find_spec("xdist") else ["-n", "10"]
    narrowed = ["-k", os.environ["TESTS"]] if os.environ.get("TESTS") else []
    return [
        Stage(
            name,
            seconds,
            pytest_of(
                host,
                *parallel,
                *narrowed,
                f"--junitxml={host.out / name}.xml",
                "--durations=15",
                *own,
            ),
            needs=("usable",),
        )
        for name, seconds, own in (("tests", 90, kernels), ("experiments", 35, experiments))
    ]


def install(host: Host) -> Stage:
    more = ["--without-kernels"] if host.dry else []
    return Stage("install", 45, host.module("bench.gpu.install", *more), beside=True)


def engine_environment() -> dict[str, str]:
    """For what starts SGLang: the wheels in front, if they are of this Python."""
    path = [str(ROOT)]
    if sys.version_info[:2] == (3, 12):
        path = [str(SHIM), str(SITE), *path]
    return {"PYTHONPATH": os.pathsep.join(path), "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}


def smoke(host: Host, name: str, seconds: float, *arguments: str, **more: bool) -> Stage:
    command = host.module("bench.gpu.smoke", str(host.out / "smoke.jsonl"), *arguments)
    return Stage(
        name, seconds, command, needs=("install",), environment=engine_environment(), **more
    )


def e2e(host: Host, name: str, seconds: float, *arguments: str) -> Stage:
    """Steps of one shape beside the plain loop; a tiny shape on a host without a GPU."""
    where = ["--device", "cuda"]
    if host.dry:
        where = ["--device", "cpu", "--rounds", "2", "--isolate", "case"]
    own = [*where, "--out", str(host.out), "--name", name, *arguments]
    # Ended before its stage, so that the run still writes what it has; the imports are beside that.
    command = host.module("bench.e2e", "--no-agreement", "--case-limit", str(seconds - 20), *own)
    needs = ("install", "usable")
    return Stage(name, seconds, command, needs, engine_environment(), waits=True)


def first(host: Host) -> list[Stage]:
    """Does it build, are the bits right, does the engine start, what does a step cost?"""
    probe = ["--out", str(host.out), "--budget", "58", "--parts"]
    parts = ["nll", "--compile"] if host.dry else ["overhead,host,lanes,attention,nll"]
    kernels, experiments = tests(host)
    return [
        # The engine's start is the host's work mostly: beside the build and the tests.
        install(host),
        Stage("facts", 20, host.module("bench.gpu.facts")),
        *build(host),
        smoke(host, "smoke", 120, beside=True),
        kernels,
        Stage(
            "probe",
            70,
            host.module("bench.gpu.probe", *probe, *parts),
            needs=("usable",),
            waits=True,
        ),
        # A CPU has the tiny one only.
        *(
            []
            if host.dry
            else [smoke(host, "smoke-opt-1.3b", 60, "--shape", "opt-1.3b", waits=True)]
        ),
        Stage(
            "directions",
            30,
            host.question(
                "bench.directions", "--budget", "15", "--rounds", "15", "--only", "opt-13b"
            ),
            needs=("usable",),
        ),
        experiments,
    ]


def second(host: Host) -> list[Stage]:
    """Is memory safe, how fast are the kernels, which forms stay?"""
    few = pytest_of(host, "-m", "gpu and not slow", "-k", SANITIZED, "--confcutdir=tests/kernels")
    few.append("tests/kernels/directions/test_cuda.py")
    lora = ["--rounds", "10", "--budget", "14", "--only", "opt-13b q_proj r8"]
    sanitizer = ["compute-sanitizer", "--error-exitcode=9", "--tool"]
    needs = ("usable",)
    # The decisions first: each case checks its own bits. Call 1 has run the tests, too.
    return [
        *build(host),
        Stage("perturbed_lora", 25, host.question("bench.experiments.lora.measure", *lora), needs),
        Stage("paired", 55, host.question("bench.paired", "--quick", "--budget", "40"), needs),
        Stage("directions", 60, host.question("bench.directions", "--budget", "45"), needs),
        *(
            Stage(tool, 35, few if host.dry else [*sanitizer, tool, *few], needs)
            for tool in ("memcheck", "racecheck")
        ),
        *tests(host),
    ]


def third(host: Host) -> list[Stage]:
    """Seconds per step of three models beside the plain loop, without and with prefill graphs."""
    shapes = ("tiny",) if host.dry else SHAPES
    plain = [e2e(host, f"e2e-{shape}", 85, "--shapes", shape) for shape in shapes]
    # Then the models whose steps the host holds up, with prefill graphs.
    graphs = [
        e2e(host, f"graphs-{shape}", 85, "--shapes", shape, "--graphs")
        for shape in (() if host.dry else ("opt-1.3b", "llama-3.1-8b"))
    ]
    return [install(host), *build(host), *plain, *graphs]


CALLS: dict[int, Callable[[Host], list[Stage]]] = {1: first, 2: second, 3: third}


def prepare_environment(*, dry: bool) -> None:
    """Variables that all stages have."""
    nvcc = os.path.realpath(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    home = os.environ.setdefault("CUDA_HOME", str(Path(nvcc).parents[1]))
    os.environ["PATH"] += f"{os.pathsep}{home}/bin"
    os.environ["PYTHONPATH"] = str(ROOT)
    # A dry run reads intermediate code, which the cache that was prepared does not have.
    os.environ["TRITON_CACHE_DIR"] = f"{TRITON_CACHE}-dry" if dry else str(TRITON_CACHE)
    defaults = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name, value in {**defaults, "MEZO_CUDA_ARCHS": compute_capability()}.items():
        os.environ.setdefault(name, value)


def compute_capability() -> str:
    """The architecture of the first GPU as a build wants it; a second one would cost time."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "-i", "0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    number = text.strip().replace(".", "")
    return number if number.isdigit() else "90"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu/contact.sh", description=__doc__)
    parser.add_argument("call", type=int, choices=CALLS)
    parser.add_argument("--limit", type=float, help="seconds of the whole call")
    parser.add_argument("--dry-run", action="store_true", help="on a host without a GPU")
    options = parser.parse_args()
    number = options.call
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    prepare_environment(dry=options.dry_run)
    with tempfile.TemporaryDirectory(prefix="mezo-gpu-") as directory:
        folder = Path(directory) / f"call{number}"
        host = Host(os.environ.get("PYTHON") or sys.executable, folder, options.dry_run)
        factor = DRY_FACTOR if host.dry else 1.0
        limit = options.limit or LIMITS[number] * factor
        call = Call(folder, out / f"call{number}.tgz", limit)
        stages = [replace(s, seconds=s.seconds * factor) for s in CALLS[number](host)]
        for name in (signal.SIGTERM, signal.SIGINT):
            # What runs is ended in a thread: the main one waits for it.
            signal.signal(name, lambda *_: threading.Thread(target=call.stop).start())
        is_good = call.run(stages, lambda: verdict.text(folder, number))
        print((folder / "verdict.txt").read_text())
    if not (ROOT / WHEELS).is_dir() and number != 2:
        print(f"contact: {WHEELS} was not here; bench/gpu/prepare.sh makes it.")
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
