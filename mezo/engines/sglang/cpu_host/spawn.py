"""First code of the processes of an engine that `launch_engine` starts.

A spawned process unpickles its target function before its arguments. `launch_engine` names these
functions as targets, so importing this module - which prepares a CPU host - comes before anything
of SGLang is imported there.

SGLang's processes answer a failure by SIGQUIT to their parent, whose handler kills the parent: the
caller of `launch_engine` would end, past its `except` and `finally`. While they start, ours leave a
sentence where `REPORT` says and end themselves; `launch_engine` then raises it.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from mezo._signals import leave_interrupts_to_the_parent
from mezo.engines.sglang.cpu_host.host import prepare_import

if TYPE_CHECKING:
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.scheduler import Scheduler

prepare_import()

REPORT = "MEZO_LAUNCH_REPORT"  # environment variable: the file for the sentence

logger = logging.getLogger(__name__)


def run_scheduler_process(*args: object, **kwargs: object) -> None:
    """SGLang's scheduler process; it loads our plugin itself."""
    from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process

    pipes = [value for value in (*args, *kwargs.values()) if isinstance(value, Connection)]
    _report_failures(Scheduler, pipes)
    run_scheduler_process(*args, **kwargs)


def run_detokenizer_process(*args: object, **kwargs: object) -> None:
    """SGLang's detokenizer process."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager, run_detokenizer_process

    _report_failures(DetokenizerManager, [])
    leave_interrupts_to_the_parent()  # 0.5.17 loads no plugin here, which would do so
    run_detokenizer_process(*args, **kwargs)


def _report_failures(cls: type[Scheduler | DetokenizerManager], pipes: list[Connection]) -> None:
    """Let a failure to make a ``cls`` end only this process, with a report to who started it."""
    original = cls.__init__

    @functools.wraps(original)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            original(*args, **kwargs)
        except Exception as error:
            logger.exception("%s cannot start", cls.__name__)
            if REPORT not in os.environ:  # not started by launch_engine
                raise
            _write_report(Path(os.environ[REPORT]), error)
            for pipe in pipes:
                pipe.send({"status": "failed"})
            sys.stdout.flush()
            sys.stderr.flush()
            # Half-made objects may have threads that would keep the process.
            os._exit(1)

    cls.__init__ = guarded


def _write_report(path: Path, error: Exception) -> None:
    """Leave what went wrong, unless another process was faster: the others fail in its wake."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}")
    except OSError:  # it is there, or the caller has given up
        pass
