"""Which backends there are, what each of them needs, and which one a call gets.

An operation registers the backends that it has. The backend of an operation is the module of that
name in the operation's package: `reference`, `cpu`, `triton` and `cuda` name the same file in each.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from mezo_kernels import _native

logger = logging.getLogger("mezo_kernels")

ENVIRONMENT_VARIABLE = "MEZO_KERNELS_BACKEND"


class Needs(NamedTuple):
    """What a backend of an operation needs beside PyTorch."""

    requirement: str | None = None  # a backend of `backends()` that must be usable
    device_type: str | None = None  # of the tensors; None for any


REFERENCE = Needs()
CPU_TORCH = Needs(device_type="cpu")
CPU_NATIVE = Needs("cpu", "cpu")
TRITON = Needs("triton", "cuda")
CUDA = Needs("cuda", "cuda")
EVERY_BACKEND = {"reference": REFERENCE, "cpu": CPU_NATIVE, "triton": TRITON, "cuda": CUDA}


@dataclass(frozen=True)
class Op:
    """The backends of an operation, the package of their modules, and who may choose."""

    needs: Mapping[str, Needs]
    package: str | None
    follows_environment: bool


# Filled by `register`.
OPS: dict[str, Op] = {}


def backends() -> dict[str, str | None]:
    """Say which backends are usable here.

        {"reference": None, "cpu": None, "triton": "why not", "cuda": "why not"}

    Returns:
        A dict from backend name to None where it is usable, else to one sentence that says why not.

    Graph-safe: yes. Cost: asks torch whether a CUDA device is visible; nothing is compiled.

    Example:
        >>> backends()["reference"] is None
        True
    """
    return {name: reason_against(name) for name in EVERY_BACKEND}


def register(
    *ops: str,
    needs: Mapping[str, Needs],
    package: str | None = None,
    follows_environment: bool = True,
) -> None:
    """Register the backends of operations.

    Args:
        ops: names of the functions, as error sentences name them.
        needs: what each backend needs, by name, in the order in which error sentences list them.
        package: dotted name of the package that has a module for each backend; None where the
            operation has no such modules.
        follows_environment: whether the environment variable may choose.
    """
    OPS.update(dict.fromkeys(ops, Op(needs, package, follows_environment)))


def resolve(op: str, explicit: str | None, device_type: str) -> str:
    """Return the backend of a call: the explicit one, else the environment's, else the best.

    The environment speaks to all operations: where it names a backend that this one does not have,
    the best one is used. A backend that was asked for never falls back.

    Args:
        op: a registered operation.
        explicit: what the caller asks for.
        device_type: of the tensors, as in `torch.device.type`.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: "cuda", for an operation that has "triton" only.
        RuntimeError: the backend that was asked for is not usable here, with the reason.
    """
    has = OPS[op]
    named, source = explicit, "backend"
    if not named and has.follows_environment:
        named, source = os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
        named = None if named in EVERY_BACKEND and named not in has.needs else named
    if not named:
        return _best(tuple(has.needs.items()), device_type)
    if named not in has.needs:
        _refuse(op, source, named, list(has.needs))
    reason = _reason_on(has.needs[named], device_type)
    if reason is not None:
        raise RuntimeError(f"{op}: {source}={named!r} is not usable here: {reason}")
    return named


def load(op: str, name: str) -> ModuleType:
    """Return the module of a backend, imported at its first use: importing triton is slow."""
    package = OPS[op].package
    assert package is not None, op
    return importlib.import_module(f"{package}.{name}")


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


def _reason_on(needs: Needs, device_type: str) -> str | None:
    """Why tensors of a type of device have no use of what needs this, or None."""
    reason = None if needs.requirement is None else reason_against(needs.requirement)
    if reason is None and not _works_on(needs, device_type):
        reason = f"It does not work on {device_type} tensors."
    return reason


def _works_on(needs: Needs, device_type: str) -> bool:
    if needs.requirement == "triton" and _is_interpreting():
        return device_type == "cpu"
    return needs.device_type in (None, device_type)


# Cached, so that a fallback is logged once.
@functools.cache
def _best(needs: tuple[tuple[str, Needs], ...], device_type: str) -> str:
    """The first usable backend for a device, which never is an interpreted one."""
    names = ("cpu",) if device_type == "cpu" else ("triton", "cuda")
    reasons = []
    for name in names:
        if name in dict(needs):
            reason = _reason_on(dict(needs)[name], device_type)
            if reason is None:
                return name
            reasons.append(reason)
    if reasons:
        logger.info("Using the slow reference backend on %s: %s", device_type, " ".join(reasons))
    return "reference"


def _refuse(op: str, source: str, named: str, names: list[str]) -> None:
    must = f"{op}: {source} must be one of {names}, got {named!r}"
    if named == "cuda" and "triton" in names:
        raise NotImplementedError(f"{must}; this operation has no CUDA C++ backend, use 'triton'.")
    raise ValueError(f"{must}; mezo_kernels.backends() says which of them are usable.")
