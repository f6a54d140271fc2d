"""The architecture that Triton compiles a launch for."""

import triton

HOPPER = 90


def current_arch() -> int:
    """Compute capability of the current device times 10; that of Hopper where there is no GPU."""
    try:
        return int(triton.runtime.driver.active.get_current_target().arch)
    except RuntimeError:  # Triton interprets
        return HOPPER
