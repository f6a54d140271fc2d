"""Puts what `prepare.sh` collected to its places on a box, beside the box's own packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile

from bench.gpu.places import HOME, PIP_FOR_BOX, ROOT, SITE, TRITON_CACHE_ARCHIVE, WHEELS


def main() -> None:
    found = sorted((ROOT / WHEELS).glob("*.whl"))
    if not found:
        raise SystemExit(
            f"install: {WHEELS} must hold SGLang's wheels, got none; run bench/gpu/prepare.sh "
            "where there is a network, and carry the folder."
        )
    # The plugin's entry point. An editable install would need a writable site-packages, and would
    # build everything once more.
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], check=True, cwd=ROOT)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command += ["--target", str(SITE)]
    if sys.version_info[:2] != (3, 12):
        # A dry run on another Python: unpacked as on the box, and not imported.
        command += PIP_FOR_BOX
    subprocess.run([*command, *found], check=True)
    if "--without-kernels" in sys.argv[1:]:
        # SGLang's compiled kernels do not load where there is no GPU, and it does without them.
        for path in SITE.glob("sgl_kernel*"):
            shutil.rmtree(path)
    archive = ROOT / WHEELS / TRITON_CACHE_ARCHIVE
    if archive.exists():
        HOME.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            tar.extractall(HOME, filter="data")
    print(f"installed {len(found)} wheels, Triton cache: {'yes' if archive.exists() else 'no'}")


if __name__ == "__main__":
    main()
