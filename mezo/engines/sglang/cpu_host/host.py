"""What SGLang needs on a host without an accelerator, and nothing else.

Three things stop SGLang 0.5.x there, and each has its function here:

1. torchvision's wheel links CUDA, so its C++ operators do not load and importing it fails for want
   of two schemas: `mezo._host.declare_torchvision_schemas`, before torchvision is imported.
2. `sgl_kernel` has no CPU wheel, but SGLang imports a few `*_cpu` names from it at module level
   (speculative decoding and KV moves): `stub_sgl_kernel`, before SGLang is imported.
3. SGLang's LoRA layers ask for pinned memory, which torch refuses without an accelerator:
   `unpin_lora_memory`, once SGLang is there; it changes four of SGLang's modules.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from mezo._host import declare_torchvision_schemas

P = ParamSpec("P")
T = TypeVar("T")

_CGROUP = Path("/sys/fs/cgroup")
_STUB_VERSION = "0.0.0"
_PINNING_FACTORIES = ("tensor", "empty", "zeros", "arange")


def is_cpu_host() -> bool:
    """Whether torch sees no accelerator here."""
    return not torch.accelerator.is_available()


def prepare_import() -> None:
    """Make `import sglang` work on a CPU host; does nothing elsewhere. Idempotent."""
    if not is_cpu_host():
        return
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    declare_torchvision_schemas()
    stub_sgl_kernel()


def free_memory() -> int:
    """Bytes that may still be allocated here: of the host, and of this process's control group."""
    import psutil  # type: ignore[import-untyped]

    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    # Cached files count as used and are dropped when memory is wanted.
    return min(free, max(limit - used + int(stat.get("inactive_file", 0)), 0))


def stub_sgl_kernel() -> None:
    """Stand in for `sgl_kernel` where it is not installed; its `*_cpu` names raise when called."""
    if "sgl_kernel" in sys.modules or importlib.util.find_spec("sgl_kernel") is not None:
        return
    stub = types.ModuleType("sgl_kernel", "Stand-in for SGLang's compiled kernels on a CPU host.")
    stub.__spec__ = importlib.util.spec_from_loader("sgl_kernel", loader=None)
    stub.__version__ = _STUB_VERSION  # type: ignore[attr-defined]
    stub.__path__ = []  # type: ignore[attr-defined]
    stub.__getattr__ = _missing_kernel  # type: ignore[method-assign]
    sys.modules["sgl_kernel"] = stub


def has_sgl_kernel() -> bool:
    """Whether SGLang's compiled kernels are installed, not our stand-in."""
    module = sys.modules.get("sgl_kernel")
    if module is not None:
        return getattr(module, "__version__", None) != _STUB_VERSION
    return importlib.util.find_spec("sgl_kernel") is not None


def _missing_kernel(name: str) -> Callable[..., None]:
    """Return a function that raises when called, for `*_cpu` names only."""
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' (stand-in) has no attribute {name!r}")

    def kernel(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f"sgl_kernel.{name} must be SGLang's compiled kernel, got mezo's stand-in for CPU "
            "hosts; turn off the feature that calls it (speculative decoding, KV moves)."
        )

    return kernel


class _UnpinnedTorch(types.ModuleType):
    """torch, as some of SGLang's modules see it: its factories ignore ``pin_memory=True``."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        if name not in _PINNING_FACTORIES:
            return attribute

        return _without_pin_argument(attribute)


def _without_pin_argument(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One of torch's factories, but it ignores ``pin_memory``."""

    @functools.wraps(create)
    def factory(*args: object, pin_memory: bool = False, **kwargs: object) -> torch.Tensor:
        return create(*args, **kwargs)

    return factory


def unpin_lora_memory() -> None:
    """Let SGLang's LoRA layers and backends work without pinned memory."""
    if not is_cpu_host():
        return
    layers = importlib.import_module("sglang.srt.lora.layers")
    if isinstance(layers.torch, _UnpinnedTorch):
        return
    names = ("torch_backend", "triton_backend", "chunked_backend")
    backends = [importlib.import_module(f"sglang.srt.lora.backend.{name}") for name in names]
    for module in (layers, *backends):
        module.torch = _UnpinnedTorch("torch")  # type: ignore[attr-defined]
    linear, native = layers.MergedColumnParallelLinearWithLoRA, backends[0].TorchNativeLoRABackend
    linear.set_lora_info = _without_pinning(linear.set_lora_info)
    native.prepare_lora_batch = _without_pinning(native.prepare_lora_batch)


def _without_pinning(method: Callable[P, T]) -> Callable[P, T]:
    """The method, but ``Tensor.pin_memory`` returns its tensor while it runs."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        pin_memory = torch.Tensor.pin_memory
        torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
        try:
            return method(*args, **kwargs)
        finally:
            torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign]

    return wrapper
