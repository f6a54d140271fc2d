"""The native module, or the reason why there is none."""

import importlib
from types import ModuleType

_C: ModuleType | None = None
import_error: str | None = None

try:
    _C = importlib.import_module("mezo_kernels._C")
except ImportError as error:
    import_error = str(error)


def module() -> ModuleType:
    """Return the native module; only to be called once `backends` has said that it is there."""
    assert _C is not None, import_error
    return _C
