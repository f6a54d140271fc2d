"""The run's name in SGLang: requests may name the adapter from attach to close, and never after.

SGLang keeps names in the caller's process, behind locks of asyncio. `sglang.Engine` runs them on
its own event loop, which cannot run while another one does: in a notebook, in a web handler.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.lora.lora_registry import LoRARegistry

_LOOK_S = 0.2


def register(engine: Engine, name: str, uid: str) -> None:
    """Let requests name an adapter that is in the engine: ``lora_path=name``.

    Neither this nor `forget` may be called with the conversation's lock: they may wait for the
    engine's event loop, in which a call of ours may be waiting for that lock.

    The name does not go to `lora_ref_cache`, from which SGLang loads unloaded adapters again by
    their path: ours has none.

    Raises:
        ValueError: the name is taken.
        RuntimeError: see `_finish`.
    """
    from sglang.srt.lora.lora_registry import LoRARef

    ref = LoRARef(lora_id=uid, lora_name=name, lora_path=f"mezo:{name}", pinned=True)
    registry = engine.tokenizer_manager.lora_registry
    _finish(engine, lambda: registry.register(ref), "attach")


def forget(engine: Engine, name: str, uid: str) -> None:
    """Take a name back, once the requests that use it have ended; an unknown one is fine.

    Raises:
        RuntimeError: requests are running and could not end while this waits. Nothing has changed.
    """
    registry = engine.tokenizer_manager.lora_registry
    if not _is_known(registry, name, uid):
        return
    counter = registry._counters.get(uid)
    running = 0 if counter is None else counter.value()
    if running and _running_loop() is not None:
        raise RuntimeError(
            f"close: no request may be using run {name!r}, got {running} that are running; await "
            "them, then close the run."
        )

    async def forget_it() -> None:
        if _is_known(registry, name, uid):
            await registry.unregister(name)
        await registry.wait_for_unload(uid)

    _finish(engine, forget_it, "close")


def _is_known(registry: LoRARegistry, name: str, uid: str) -> bool:
    """Whether a name is ours; it may be unloaded behind our back, or another adapter's by now."""
    ref = registry.get_all_adapters().get(name)
    return ref is not None and ref.lora_id == uid


def _finish(engine: Engine, make: Callable[[], Coroutine[object, None, None]], op: str) -> None:
    """Run a coroutine of SGLang's to its end, whatever event loop is running.

    Raises:
        RuntimeError: a loop runs in this thread and the coroutine would have to wait for it.
    """
    running = _running_loop()
    if engine.loop.is_running() and running is not engine.loop:
        _finish_in_another_thread(engine.loop, make())
        return
    # A free lock of asyncio can be acquired without a loop, whoever runs it meanwhile. One that is
    # held can only be released in a loop.
    work = make()
    try:
        work.send(None)
    except StopIteration:
        return
    except (AttributeError, RuntimeError):  # it has to wait, and there is no loop to wait in
        if running is not None:
            raise
        engine.loop.run_until_complete(make())
        return
    work.close()
    raise RuntimeError(
        f"{op}: SGLang's adapter registry must be free, got it in use by a load, an unload or a "
        "request that waits in this event loop; await those and call again."
    )


def _finish_in_another_thread(
    loop: asyncio.AbstractEventLoop, work: Coroutine[object, None, None]
) -> None:
    """Let a loop that runs in another thread finish a coroutine; run it here if it has stopped."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        while not future.done():
            with suppress(concurrent.futures.TimeoutError):
                future.result(_LOOK_S)
            if not future.done() and not loop.is_running() and _running_loop() is None:
                with suppress(RuntimeError):  # somebody runs it again
                    loop.run_until_complete(asyncio.wrap_future(future, loop=loop))
        future.result()
    except BaseException:
        future.cancel()
        raise


def is_loop_running() -> bool:
    """Whether an event loop runs in this thread."""
    return _running_loop() is not None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
