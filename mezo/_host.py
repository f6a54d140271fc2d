"""Lets transformers and SGLang import torchvision on hosts whose torch has no CUDA."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

_library: Any = None


def declare_torchvision_schemas() -> None:
    """Declare two operators of torchvision where its C++ part cannot be loaded. Idempotent.

    The only torchvision wheel links CUDA's torch. On a CPU build of torch its operators stay
    unregistered, and `import torchvision` - with it transformers and SGLang - then fails while it
    registers fake kernels for `nms`. Two schemas are enough for that; the operators stay
    unusable, and nothing in a language model calls them.
    """
    global _library
    if _library is not None or torch.version.cuda or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.origin or _loads(Path(spec.origin).parent / "_C.so"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library = library  # the schemas live as long as this object


def _loads(path: Path) -> bool:
    """Whether an operator library can be loaded; it then stays loaded, as torchvision wants it."""
    try:
        torch.ops.load_library(str(path))
    except OSError:
        return False
    return True
