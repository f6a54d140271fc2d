"""Lets transformers and SGLang import torchvision on hosts whose torch has no CUDA."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)
_library: Any = None


def declare_torchvision_schemas() -> None:
    """Declare two operators of torchvision where its C++ part cannot be loaded. Idempotent.

    The only torchvision wheel links CUDA's torch. On a CPU build of torch its operators stay
    unregistered, and `import torchvision` - with it transformers and SGLang - then fails while it
    registers fake kernels for `nms`. Two schemas are enough for that; the operators stay
    unusable, and nothing in a language model calls them.
    """
    global _library
    has_gpu_build = torch.version.cuda or torch.version.hip
    if _library is not None or has_gpu_build or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.origin or _loads(Path(spec.origin).parent / "_C.so"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library = library  # the schemas live as long as this object


def fp32_products() -> str | None:
    """What torch computes fp32 products on the CPU in, if that is not fp32: "bf16" or "tf32".

    `torch.set_float32_matmul_precision` sets it, and newer switches of `torch.backends`.
    """
    matmul: Any = torch.backends.mkldnn
    setting = getattr(getattr(matmul, "matmul", None), "fp32_precision", "none")
    return None if setting in ("none", "ieee") else str(setting)


def warn_of_products(setting: str | None, where: str) -> None:
    """Say once at attach that fp32 is not computed in fp32."""
    if setting is not None:
        logger.warning(
            "attach: fp32 products must be fp32 on a CPU host, got %s in %s, which is off by up to "
            "1e-3 and drowns the difference of a small eps; call "
            "torch.set_float32_matmul_precision('highest') there, or start SGLang without "
            "enable_tf32_matmul",
            setting,
            where,
        )


def _loads(path: Path) -> bool:
    """Whether an operator library can be loaded; it then stays loaded, as torchvision wants it."""
    try:
        torch.ops.load_library(str(path))
    except OSError:
        return False
    return True
