"""The native module of the experiments, or the reason why there is none."""

import importlib
from types import ModuleType

C: ModuleType | None = None
_import_error: str | None = None

try:
    C = importlib.import_module("bench.experiments._C")
except ImportError as error:
    _import_error = str(error)


def reason_against_cuda() -> str | None:
    """Why the CUDA kernels are not there, and how to build them, or None."""
    if C is None:
        reason = f"is not built or does not load ({_import_error})"
    elif not hasattr(C, "cuda_perturbed_lora"):
        reason = "was built without CUDA"
    else:
        return None
    return (
        f"The native module bench.experiments._C {reason}; build it where nvcc is installed, with "
        "`MEZO_BUILD_EXPERIMENTS=1 python setup.py build_ext --inplace` or "
        "`bench/build_plain.sh --experiments`."
    )


def with_cuda() -> ModuleType:
    """Return the native module; RuntimeError where it has no CUDA kernels."""
    reason = reason_against_cuda()
    if C is None or reason is not None:
        raise RuntimeError(reason)
    return C
