"""How the native modules are built, and what they are made of: no libtorch, no CUDA driver."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mezo_kernels import _native
from tests.support import cuda_sass
from tests.support.native_sources import CSRC, EXPERIMENTS, PARTS, ROOT, listed, paths

PLAIN = ROOT / "bench" / "build_plain.sh"


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


@pytest.mark.parametrize("directory", [CSRC, EXPERIMENTS], ids=["kernels", "experiments"])
def test_the_list_has_every_source_once(directory):
    sources = listed(directory)
    found = [path for path in directory.rglob("*") if path.suffix in (".cpp", ".cu", ".c", ".cc")]
    assert sorted(source.path for source in sources) == sorted(found)
    for source in sources:
        assert source.part in PARTS, source
        assert all(flag.startswith("-m") for flag in source.flags), source
        assert source.part == "cuda" or source.path.suffix != ".cu", source


@pytest.mark.parametrize("reader", [ROOT / "CMakeLists.txt", PLAIN], ids=lambda path: path.name)
def test_who_reads_the_lists_names_no_source(reader):
    text = reader.read_text()
    assert "csrc/sources.txt" in text
    for path in paths(CSRC, *PARTS) + paths(EXPERIMENTS, *PARTS):
        assert path.name not in text


def build_plain(directory: Path, **environment: str) -> str:
    """Run a copy of build_plain.sh on copies of the sources; returns what it prints."""
    for path in (CSRC, EXPERIMENTS):
        shutil.copytree(path, directory / path.relative_to(ROOT))
    shutil.copy(PLAIN, directory / "bench")
    (directory / "mezo_kernels").mkdir()
    return subprocess.run(
        [directory / "bench" / "build_plain.sh", "--experiments"],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def names_of(directory: Path) -> set[str]:
    """What the native module in a directory exports, read in a process of its own."""
    (path,) = directory.glob("_C.*")
    code = (
        "import json, sys\n"
        "from importlib import util\n"
        "spec = util.spec_from_file_location('_C', sys.argv[1])\n"
        "module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(json.dumps(dir(module)))\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    return set(
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    )


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_build_plain_without_cuda(native, tmp_path):
    said = build_plain(tmp_path, MEZO_SKIP_CUDA_BUILD="1")
    assert said.count("without the CUDA kernels: MEZO_SKIP_CUDA_BUILD is set") == 2
    of_cpu = {name for name in dir(native) if not name.startswith("cuda_")}
    assert names_of(tmp_path / "mezo_kernels") == of_cpu
    experiments = names_of(tmp_path / "bench" / "experiments")
    assert "cpu_advance" in experiments
    assert not any(name.startswith("cuda_") for name in experiments)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.skipif(cuda_sass.find_nvcc() is None, reason="nvcc is not installed")
def test_build_plain_with_cuda(native, tmp_path):
    said = build_plain(tmp_path, MEZO_SKIP_CUDA_BUILD="0", MEZO_CUDA_ARCHS="90")
    assert said.count("for sm 90") == 2
    names = names_of(tmp_path / "mezo_kernels")
    assert names >= set(dir(native))
    assert "cuda_perturb" in names
    assert names_of(tmp_path / "bench" / "experiments") >= {"cuda_advance", "cuda_perturbed_lora"}
