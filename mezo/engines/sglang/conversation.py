"""One conversation with one engine: one message at a time, and each gets its own answer.

SGLang's RPC channel has no ids: whoever reads next gets the next reply. A call that was interrupted
leaves its reply behind, and two threads read each other's. Here every message has an id that comes
back with its answer, answers to others are dropped, and one lock keeps an engine's callers apart.
"""

from __future__ import annotations

import importlib
import logging
import threading
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from mezo.core.messages import METHOD, Hello, HelloReply, Request
from mezo.core.wire import Answer, Message, to_json
from mezo.engines.sglang import compat
from mezo.engines.sglang.processes import CrashGuard, EngineProcesses

R = TypeVar("R")
logger = logging.getLogger(__name__)
# SGLang's watchdog looks after its processes once a second; this is to see a dead one sooner.
_POLL_MS = 200
_making = threading.Lock()


class Conversation:
    """The messages of this process to one `sglang.Engine`. Get it with `Conversation.of`.

    Attributes:
        lock: held from a message to its reply, and by whoever needs several in a row.
        processes: the engine's processes.
    """

    def __init__(self, engine: Any) -> None:
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self.processes = EngineProcesses(engine)
        self._guard = CrashGuard(engine, self.processes)
        self._runs: set[str] = set()  # ids of the attached ones
        self._engine = engine
        self._may_be_unanswered = False

    @classmethod
    def of(cls, engine: Any) -> Conversation:
        """The engine's conversation; all runs in it share one."""
        with _making:
            if not hasattr(engine, "mezo_conversation"):
                engine.mezo_conversation = cls(engine)
            conversation: Conversation = engine.mezo_conversation
            return conversation

    def opened(self, run: str) -> None:
        """A run was attached; while there is one, the caller is guarded."""
        self._runs.add(run)
        self._guard.install()

    def closed(self, run: str) -> None:
        """A run was closed. Where a process has died, the guard stays: no call says so then."""
        self._runs.discard(run)
        if not self._runs:
            self._guard.remove()

    def is_over(self) -> bool:
        """Whether the engine was shut down or has died and cannot answer."""
        return self._engine.send_to_rpc is None or self.processes.death() is not None

    def call(self, request: Request[R]) -> R:
        """Send a request to all scheduler processes and return rank 0's reply.

        Raises:
            ValueError, NotImplementedError: as the worker raised it.
            RuntimeError: any other failure in a worker, a dead scheduler process, an engine that
                was shut down.
        """
        return self._exchange(Message.of(request)).result(request)

    def hello(self) -> HelloReply:
        """Check that the plugin is there and speaks our version; returns what the engine is.

        Raises:
            RuntimeError: it is not, or does not.
        """
        hello = self.call(Hello())
        self.processes.confirm(hello.pids)
        self._keep_rpc_apart()
        return hello

    def _exchange(self, message: Message) -> Answer:
        """Send and wait for the answer with our id, looking after the processes meanwhile."""
        from sglang.srt.managers.io_struct import RpcReqInput

        op = message.operation
        with self.lock:
            self._check_alive(op)
            self._may_be_unanswered = True  # until it is not: an interruption leaves it so
            rpc = RpcReqInput(method=METHOD, parameters=to_json(message))
            compat.send(self._engine.send_to_rpc, rpc)
            while True:
                answer = _answer_of(self._receive(op))
                if answer is not None and answer.id == message.id:
                    self._may_be_unanswered = False
                    return answer
                logger.debug("%s: dropped an answer to another message", op)

    def _receive(self, op: str) -> Any:
        """The next reply, to whichever message."""
        zmq: Any = importlib.import_module("zmq")
        socket = self._engine.send_to_rpc
        try:
            while not socket.poll(_POLL_MS):
                self._check_alive(op)
            return compat.receive(socket)
        except zmq.ZMQError:
            self._check_alive(op)  # shut down by another thread
            raise

    def _check_alive(self, op: str) -> None:
        """Raise unless the engine can answer."""
        if death := self.processes.death():
            self._guard.notice()
            raise RuntimeError(
                f"{op}: SGLang's processes must be alive, got {death}; see the engine's log, start "
                "it again and attach. What was not saved is gone with them."
            )
        if self._engine.send_to_rpc is None:
            raise RuntimeError(
                f"{op}: the engine must be running, got one that was shut down; start another and "
                "attach. What was not saved is gone with it."
            )

    def _keep_rpc_apart(self) -> None:
        """Let SGLang's own calls wait for ours, and not read what an interrupted one has left."""
        if "collective_rpc" in vars(self._engine):
            return
        original = self._engine.collective_rpc

        def collective_rpc(method: str, **kwargs: Any) -> Any:
            with self.lock:
                if self._may_be_unanswered:
                    self.call(Hello())  # replies come in order: what was before it is read now
                return original(method, **kwargs)

        self._engine.collective_rpc = collective_rpc


def _answer_of(reply: Any) -> Answer | None:
    """The answer in what the channel has brought; None for a reply that is not to us.

    Raises:
        RuntimeError: it comes from an engine without our plugin, or with another version of it.
    """
    answer = Answer.read(reply.message)
    if answer is None and not reply.success and f"'{METHOD}'" in reply.message:
        # SGLang's own answer to a method that it does not know.
        raise RuntimeError(
            "attach: the mezo plugin must be loaded in SGLang's scheduler processes, got "
            f"{reply.message!r}; install mezo-sglang in the engine's environment, and let "
            "SGLANG_PLUGINS, if set, contain 'mezo'."
        )
    return answer
