"""SGLang's own processes: which of the caller's children they are, and what their end does.

SGLang answers a dead process by SIGQUIT to the caller, whose handler kills the caller, past its
`except` and `finally`. While a run is attached, the caller gets an exception instead.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)


class EngineProcesses:
    """The processes of one engine on this host.

    Args:
        engine: the `sglang.Engine`.
    """

    def __init__(self, engine: Engine) -> None:
        pids: list[int] = engine.get_all_child_pids()
        # An engine that did not start its schedulers lists none. `confirm` leaves the right ones
        # when they answer.
        self._is_confirmed = bool(pids)
        self._processes = [
            p for p in multiprocessing.active_children() if not pids or p.pid in pids
        ]

    def confirm(self, pids: Iterable[int]) -> None:
        """Watch no others than those that have said who they are, where nobody else did."""
        if not self._is_confirmed:
            known = set(pids)
            self._processes = [p for p in self._processes if p.pid in known]
            self._is_confirmed = True

    def death(self) -> str | None:
        """What has ended, in words, or None while all are alive."""
        dead = [p for p in self._processes if not p.is_alive()]
        if not dead:
            return None
        return f"{len(dead)} dead (exit code {dead[0].exitcode})"


class CrashGuard:
    """Turns SGLang's answer to a dead process, to kill the caller, into an exception.

    Before an engine's first request SGLang handles SIGQUIT by a Python handler: ours raises in the
    main thread, unless a call of ours has raised already. From then on it is a callback of the
    engine's event loop: ours stops that loop, so that the call that waits in it raises. So does
    each later one, which SGLang would let wait without end.

    Args:
        engine: the `sglang.Engine`.
        processes: its processes.
    """

    def __init__(self, engine: Engine, processes: EngineProcesses) -> None:
        self._manager = engine.tokenizer_manager
        self._processes = processes
        self._is_installed = False
        self._is_noticed = False
        # A loop that ran before we came is somebody else's, as in a notebook: not ours to stop.
        self._is_own_loop = not engine.loop.is_running()
        self._theirs = getattr(self._manager, "signal_handler_class", None)

    def install(self) -> None:
        """Replace SGLang's handler by ours; only the main thread can."""
        if self._is_installed or not self._can_handle():
            return
        guard = self

        class Guarded(self._theirs):  # type: ignore[misc, name-defined]
            def __init__(self, manager: TokenizerManager) -> None:
                super().__init__(manager)
                if guard._is_noticed:
                    manager.event_loop.call_soon(guard._stop_loop)

            def running_phase_sigquit_handler(
                self, signum: int | None = None, frame: FrameType | None = None
            ) -> None:
                guard._stop_loop()

        self._manager.signal_handler_class = Guarded
        if self._manager.event_loop is None:
            self._previous = signal.signal(signal.SIGQUIT, self._raise)
        else:
            self._manager.event_loop.add_signal_handler(signal.SIGQUIT, self._stop_loop)
        self._is_installed = True

    def remove(self) -> None:
        """Put SGLang's handler back; one that has been replaced meanwhile stays."""
        if not self._is_installed or not self._can_handle():
            return
        self._is_installed = False
        self._manager.signal_handler_class = self._theirs
        if self._manager.event_loop is not None:
            theirs = self._theirs(self._manager).running_phase_sigquit_handler  # type: ignore[misc]
            self._manager.event_loop.add_signal_handler(signal.SIGQUIT, theirs)
        elif signal.getsignal(signal.SIGQUIT) == self._raise:
            signal.signal(signal.SIGQUIT, self._previous)

    def notice(self) -> None:
        """A call of ours is about to say that a process is dead: nobody has to say it again."""
        if not self._is_noticed:
            self._is_noticed = True
            if self._is_installed and self._manager.event_loop is not None:
                self._manager.event_loop.call_soon_threadsafe(self._stop_loop)

    def _can_handle(self) -> bool:
        loop = getattr(self._manager, "event_loop", None)
        return (
            threading.current_thread() is threading.main_thread()
            and self._theirs is not None
            and self._is_own_loop
            and (loop is None or not loop.is_closed())
        )

    def _sentence(self) -> str:
        return (
            "SGLang's processes must be alive, got "
            f"{self._processes.death() or 'a signal that one has failed'}; see the engine's log, "
            "start it again and attach."
        )

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self._is_noticed:
            self._is_noticed = True
            raise RuntimeError(self._sentence())

    def _stop_loop(self) -> None:
        self._is_noticed = True
        logger.error(self._sentence())
        loop = self._manager.event_loop
        loop.stop()
        loop.call_soon(self._stop_loop)  # whoever runs it next waits for nobody, too
