"""Backend choice of the operations that are written in torch and Triton, without a native part."""

import functools
import importlib.util
import logging
import os

import torch

from mezo_kernels.backends import ENVIRONMENT_VARIABLE

logger = logging.getLogger("mezo_kernels")

_NAMES = ("reference", "cpu", "triton")


def resolve_torch(function: str, explicit: str | None, device_type: str) -> str:
    """Return the backend of a call: the explicit one, else the environment's, else the best.

    The cpu backend of these operations is torch, so it needs no native module. There is no cuda
    backend: naming it is an error, while the environment's `cuda`, meant for the operations that
    have one, leaves the choice to the device.
    """
    named = explicit
    if explicit is None:
        named = os.environ.get(ENVIRONMENT_VARIABLE) or None
        named = None if named == "cuda" else named
    if named is None:
        return _best(device_type)
    source = "backend" if explicit is not None else ENVIRONMENT_VARIABLE
    if named == "cuda":
        raise NotImplementedError(
            f"{function}: backend must be one of {list(_NAMES)}, got 'cuda'; this operation has "
            "no CUDA C++ form, use 'triton'."
        )
    if named not in _NAMES:
        raise ValueError(f"{function}: {source} must be one of {list(_NAMES)}, got {named!r}.")
    reason = None
    if named == "triton":
        reason = _reason_against_triton(device_type)
    elif named == "cpu" and device_type != "cpu":
        reason = f"It does not work on {device_type} tensors."
    if reason is not None:
        raise RuntimeError(f"{function}: {source}={named!r} is not usable here: {reason}")
    return named


# Cached, so that a fallback is logged once.
@functools.cache
def _best(device_type: str) -> str:
    if device_type == "cpu":
        return "cpu"
    reason = _reason_against_triton(device_type)
    if reason is None:
        return "triton"
    logger.info("Using the slow reference backend on %s: %s", device_type, reason)
    return "reference"


def _reason_against_triton(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "The package triton is not installed; install it with `pip install triton`."
    # As triton reads it: once it is imported, kernels are interpreted on CPU tensors.
    if os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "y", "yes"}:
        return None if device_type == "cpu" else "Triton's interpreter works on cpu tensors."
    if device_type != "cuda":
        return f"It works on {device_type} tensors only where TRITON_INTERPRET=1 is set."
    return None if torch.cuda.is_available() else "No CUDA device is visible to torch."
