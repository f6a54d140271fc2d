"""Which backends are usable here, and which one a call gets."""

import functools
import importlib.util
import logging
import os

import torch

from mezo_kernels import _native

logger = logging.getLogger("mezo_kernels")

ENVIRONMENT_VARIABLE = "MEZO_KERNELS_BACKEND"
# Device type -> backends that it gets by itself, best first; the reference works everywhere.
_BY_DEVICE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_NAMES = ("reference", "cpu", "triton", "cuda")


def backends() -> dict[str, str | None]:
    """Say which backends are usable here.

        {"reference": None, "cpu": None, "triton": "why not", "cuda": "why not"}

    Returns:
        A dict from backend name to None where it is usable, else to one sentence that says why not.

    Graph-safe: yes. Cost: asks torch whether a CUDA device is visible; nothing is compiled.
    """
    return {name: reason_against(name) for name in _NAMES}


def reason_against(name: str) -> str | None:
    """Why a backend is not usable here, or None."""
    if name == "reference":
        return None
    if name == "triton":
        return _reason_against_triton()
    if _native.import_error is not None:
        return (
            "The native module mezo_kernels._C is not built or does not load "
            f"({_native.import_error}); build it with `pip install -e . --no-build-isolation`."
        )
    if name == "cpu":
        return None
    if _native.module().build_info()["cuda_archs"] is None:
        return "The native module was built without CUDA; rebuild it where nvcc is installed."
    if not torch.cuda.is_available():
        return "No CUDA device is visible to torch."
    return None


def _reason_against_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "The package triton is not installed; install it with `pip install triton`."
    if _is_interpreting() or (torch.cuda.is_available() and torch.version.hip is None):
        return None
    return "No CUDA device is visible to torch; TRITON_INTERPRET=1 runs it slowly on the CPU."


def _is_interpreting() -> bool:
    """Whether triton, once imported, interprets kernels on CPU tensors instead of compiling."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "y", "yes"}


def works_on(name: str, device_type: str) -> bool:
    """Whether a backend takes tensors of a kind of device."""
    if name == "triton" and _is_interpreting():
        return device_type == "cpu"
    return name in (*_BY_DEVICE.get(device_type, ()), "reference")


def resolve(explicit: str | None, device_type: str) -> str:
    """Return the backend for a device: the explicit one, else the environment's, else the best.

    Raises ValueError for an unknown name, RuntimeError for a named backend that is not usable:
    a backend that was asked for never falls back.
    """
    named = explicit or os.environ.get(ENVIRONMENT_VARIABLE)
    if not named:
        return _best(device_type)
    _check_named(named, explicit is not None, device_type)
    return named


# Cached, so that a fallback is logged once.
@functools.cache
def _best(device_type: str) -> str:
    candidates = _BY_DEVICE.get(device_type, ("reference",))
    best = next(
        name for name in candidates if works_on(name, device_type) and reason_against(name) is None
    )
    if best == "reference" and len(candidates) > 1:
        reasons = " ".join(str(reason_against(name)) for name in candidates[:-1])
        logger.info("Using the slow reference backend on %s: %s", device_type, reasons)
    return best


def _check_named(name: str, is_explicit: bool, device_type: str) -> None:
    source = "backend" if is_explicit else ENVIRONMENT_VARIABLE
    if name not in _NAMES:
        raise ValueError(
            f"{source} must be one of {list(_NAMES)}, got {name!r}; "
            "mezo_kernels.backends() says which of them are usable."
        )
    reason = reason_against(name)
    if reason is None and not works_on(name, device_type):
        reason = f"It does not work on {device_type} tensors."
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} is not usable here: {reason}")
