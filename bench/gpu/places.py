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
SHIM = ROOT / "bench" / "gpu" / "shim"
