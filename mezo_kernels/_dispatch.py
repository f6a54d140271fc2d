"""Backend choice of the operations that have no CUDA C++ form."""

import functools
import logging
import os

from mezo_kernels.backends import ENVIRONMENT_VARIABLE, reason_against, works_on

logger = logging.getLogger("mezo_kernels")

_NAMES = ("reference", "cpu", "triton")


def resolve_torch(
    function: str,
    explicit: str | None,
    device_type: str,
    *,
    is_cpu_native: bool = False,
) -> str:
    """Return the backend of a call: the explicit one, else the environment's, else the best.

    The cpu backend of these operations is torch and needs no native module, unless
    ``is_cpu_native``. There is no cuda backend: naming it is an error, while the environment's
    `cuda`, meant for the operations that have one, leaves the choice to the device.
    """
    names = list(_NAMES)
    named = explicit
    if explicit is None:
        named = os.environ.get(ENVIRONMENT_VARIABLE) or None
        named = None if named == "cuda" else named
    if named is None:
        return _best(device_type, is_cpu_native)
    source = "backend" if explicit is not None else ENVIRONMENT_VARIABLE
    if named == "cuda":
        raise NotImplementedError(
            f"{function}: backend must be one of {names}, got 'cuda'; this operation has "
            "no CUDA C++ form, use 'triton'."
        )
    if named not in names:
        raise ValueError(f"{function}: {source} must be one of {names}, got {named!r}.")
    reason = None
    if named == "triton":
        reason = _reason_against_triton(device_type)
    elif named == "cpu":
        reason = _reason_against_cpu(device_type, is_cpu_native)
    if reason is not None:
        raise RuntimeError(f"{function}: {source}={named!r} is not usable here: {reason}")
    return named


def resolve_native(function: str, explicit: str | None, device_type: str = "cpu") -> str:
    """Return the backend of an operation that has "cpu", native, and "reference" alone.

    The environment, which speaks to all operations, is not asked.
    """
    if explicit not in (None, "reference", "cpu"):
        raise ValueError(
            f"{function}: backend must be 'reference', 'cpu' or None, got {explicit!r}; "
            "pass None for the best one."
        )
    if explicit == "reference":
        return explicit
    reason = _reason_against_cpu(device_type, is_native=True)
    if reason is not None and explicit == "cpu":
        raise RuntimeError(f"{function}: backend='cpu' is not usable here: {reason}")
    return "cpu" if reason is None else "reference"


# Cached, so that a fallback is logged once.
@functools.cache
def _best(device_type: str, is_cpu_native: bool) -> str:
    if device_type == "cpu":
        best, reason = "cpu", _reason_against_cpu(device_type, is_cpu_native)
    else:
        best, reason = "triton", _reason_against_triton(device_type)
    if reason is None:
        return best
    logger.info("Using the slow reference backend on %s: %s", device_type, reason)
    return "reference"


def _reason_against_cpu(device_type: str, is_native: bool) -> str | None:
    reason = reason_against("cpu") if is_native else None
    if reason is None and device_type != "cpu":
        reason = f"It does not work on {device_type} tensors."
    return reason


def _reason_against_triton(device_type: str) -> str | None:
    reason = reason_against("triton")
    if reason is None and not works_on("triton", device_type):
        reason = f"It does not work on {device_type} tensors."
    return reason
