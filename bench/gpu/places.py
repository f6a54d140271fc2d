"""Where things are on a GPU box; nothing is imported here but Python's own library."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# In the checkout: what `prepare.sh` collects and a box is sent.
WHEELS = Path(".whl")
TRITON_CACHE_ARCHIVE = "triton-cache.tar.xz"
# On the box. Triton keeps absolute paths in its cache, so that this one is the same everywhere.
HOME = Path("/tmp/mezo-gpu")
SITE = HOME / "site"
TRITON_CACHE = HOME / "triton-cache"
# pip's options for its Python, on another one.
PIP_FOR_BOX = [
    *("--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"),
    *(word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)),
    *(
        word
        for version in ("_2_34", "_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_5", "1")
        for word in ("--platform", f"manylinux{version}_x86_64")
    ),
]
SHIM = ROOT / "bench" / "gpu" / "shim"
