"""First code of SGLang's worker processes on a CPU host.

A spawned process unpickles its target function before its arguments. `launch_engine` names these
functions as targets, so importing this module - which prepares the host - comes before anything of
SGLang is imported there.
"""

from __future__ import annotations

from typing import Any

from mezo.sglang.cpu_host import prepare_import

prepare_import()


def run_scheduler_process(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process; it loads our plugin itself."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    return run_scheduler_process(*args, **kwargs)


def run_detokenizer_process(*args: Any, **kwargs: Any) -> Any:
    """SGLang's detokenizer process."""
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    return run_detokenizer_process(*args, **kwargs)
