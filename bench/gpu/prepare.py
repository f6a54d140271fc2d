"""`bench/gpu/prepare.sh`: the wheels and the Triton cache that go to a box without a network."""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.places import PIP_FOR_BOX, ROOT, TRITON_CACHE, TRITON_CACHE_ARCHIVE, WHEELS

LIST = Path(__file__).parent / "wheels.txt"
# Of the box, for its Triton: the key of a compiled kernel has all of these in it.
BOX_PACKAGES = ("torch==2.11.0", "triton==3.6.0", "numpy", "pytest", "scipy")
BOX_VENV = ROOT / "build" / "box-venv"
# What travels to a box is limited, and the checkout has its share.
LIMIT_MIB = 60.0


@dataclass(frozen=True)
class Wheel:
    """A line of wheels.txt; ``drop`` is a pattern of files that the box does not need."""

    requirement: str
    drop: str | None = None
    strip: bool = False

    @property
    def pattern(self) -> str:
        """Of the wheel's file name."""
        name, _, version = self.requirement.partition("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


def wheels(text: str) -> list[Wheel]:
    """The lines of wheels.txt."""
    found = []
    for line in text.splitlines():
        requirement, _, remark = line.partition("#")
        if not requirement.strip():
            continue
        drop = re.search(r"shrink: drop ([^;\s]+)", remark)
        found.append(Wheel(requirement.strip(), drop and drop[1], "strip" in remark))
    return found


def download(wheel: Wheel, folder: Path) -> None:
    """Download a wheel for the box's Python, and cut it down where the list says so."""
    if list(folder.glob(wheel.pattern)):
        return
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        command += ["--no-deps", *PIP_FOR_BOX, "-d", directory, wheel.requirement]
        subprocess.run(command, check=True)
        (source,) = Path(directory).glob("*.whl")
        target = Path(directory) / "cut" / source.name
        target.parent.mkdir()
        if wheel.drop:
            cut(source, target, wheel)
        else:
            source.rename(target)
        # Whole files only: a download that is interrupted leaves none.
        part = folder / f".{source.name}.part"
        part.write_bytes(target.read_bytes())
        part.rename(folder / source.name)


def cut(source: Path, target: Path, wheel: Wheel) -> None:
    """Copy a wheel without some files; its RECORD is written anew, or pip would refuse it."""
    record = []
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        (record_name,) = (n for n in old.namelist() if n.endswith(".dist-info/RECORD"))
        for info in old.infolist():
            name = info.filename
            if info.is_dir() or name == record_name or re.fullmatch(wheel.drop or "", name):
                continue
            content = old.read(info)
            if wheel.strip and re.search(r"\.so(\.\d+)*$", name):
                content = stripped(content)
            new.writestr(info, content, zipfile.ZIP_DEFLATED, 9)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{name},sha256={digest.decode()},{len(content)}")
        new.writestr(record_name, "\n".join([*record, f"{record_name},,", ""]))


def stripped(library: bytes) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        file.write(library)
        file.flush()
        subprocess.run(["strip", "--strip-unneeded", file.name], check=True)
        return Path(file.name).read_bytes()


def collect(folder: Path) -> None:
    """Fill the folder; wheels that are not in the list go."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = wheels(LIST.read_text())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda wheel: download(wheel, folder), wanted))
    known = {path for wheel in wanted for path in folder.glob(wheel.pattern)}
    for path in [*folder.glob("*.whl"), *folder.glob(".*.part")]:
        if path not in known:
            path.unlink()
    print(f"prepare: {len(known)} wheels, {mebibytes(folder):.1f} MiB in {folder}")


def mebibytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / (1 << 20)


def fill_triton_cache(folder: Path) -> None:
    """Compile for sm_90 what the launching code asks for, with the box's Python and Triton.

    Paths are part of what Triton keeps, so the cache is made where the box has it.
    """
    python = BOX_VENV / "bin" / "python"
    if not python.exists():
        base = os.environ.get("BOX_PYTHON", "python3.12")
        print(f"prepare: {BOX_VENV.name} with {', '.join(BOX_PACKAGES)} (takes minutes)")
        subprocess.run([base, "-m", "venv", BOX_VENV], check=True)
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*install, *BOX_PACKAGES], check=True)
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(TRITON_CACHE),
        "PYTHONPATH": str(ROOT),
    }
    variants = ["bench.gpu.probe", "--compile", "--parts", "attention,nll"]
    for module in (["bench.gpu.compile_ahead"], variants):
        # A test that fails has compiled what it could; the next one goes on.
        subprocess.run([python, "-m", *module], env=environment, cwd=ROOT)
    # The tests read the intermediate code; a launch needs the binary and what describes it.
    for path in TRITON_CACHE.rglob("*.*"):
        if path.is_file() and path.suffix not in (".cubin", ".json"):
            path.unlink()
    with tarfile.open(folder / TRITON_CACHE_ARCHIVE, "w:xz") as tar:
        tar.add(TRITON_CACHE, TRITON_CACHE.name)
    kernels = len(list(TRITON_CACHE.rglob("*.cubin")))
    print(f"prepare: {kernels} compiled kernels in {folder / TRITON_CACHE_ARCHIVE}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu/prepare.sh", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / WHEELS)
    parser.add_argument("--triton-cache", action="store_true", help="compile kernels ahead, too")
    options = parser.parse_args()
    collect(options.folder)
    if options.triton_cache:
        fill_triton_cache(options.folder)
    size = mebibytes(options.folder)
    if size > LIMIT_MIB:
        raise SystemExit(
            f"prepare: the folder must be at most {LIMIT_MIB:.0f} MiB to travel, got {size:.1f}; "
            "cut a wheel down in bench/gpu/wheels.txt."
        )


if __name__ == "__main__":
    main()
