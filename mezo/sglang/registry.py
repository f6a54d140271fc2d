"""The run's name in SGLang: requests may name the adapter from attach to close, and never after.

SGLang keeps names in the caller's process, behind locks of asyncio. `sglang.Engine` runs them on
its own event loop, which cannot run while another one does: in a notebook, in a web handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def register(engine: Any, name: str, uid: str) -> None:
    """Let requests name an adapter that is in the engine: ``lora_path=name``.

    The name does not go to `lora_ref_cache`, from which SGLang loads unloaded adapters again by
    their path: ours has none.

    Raises:
        ValueError: the name is taken.
        RuntimeError: see `_finish`.
    """
    from sglang.srt.lora.lora_registry import LoRARef

    ref = LoRARef(lora_id=uid, lora_name=name, lora_path=f"mezo:{name}", pinned=True)
    _finish(engine, engine.tokenizer_manager.lora_registry.register(ref), "attach")


def forget(engine: Any, name: str, uid: str) -> None:
    """Take a name back, once the requests that use it have ended; an unknown one is fine.

    Raises:
        RuntimeError: requests are running and could not end while this waits. Nothing has changed.
    """
    registry = engine.tokenizer_manager.lora_registry
    ref = registry.get_all_adapters().get(name)
    if ref is None or ref.lora_id != uid:
        return  # unloaded behind our back, or another adapter by now
    counter = registry._counters.get(uid)
    running = 0 if counter is None else counter.value()
    if running and _running_loop() is not None:
        raise RuntimeError(
            f"close: no request may be using run {name!r}, got {running} that are running; await "
            "them, then close the run."
        )

    async def forget_it() -> None:
        await registry.unregister(name)
        await registry.wait_for_unload(uid)

    _finish(engine, forget_it(), "close")


def _finish(engine: Any, work: Coroutine[Any, Any, None], op: str) -> None:
    """Run a coroutine of SGLang's to its end, whatever event loop is running.

    Raises:
        RuntimeError: a loop runs in this thread and the coroutine would have to wait for it.
    """
    if engine.loop.is_running() and _running_loop() is not engine.loop:
        asyncio.run_coroutine_threadsafe(work, engine.loop).result()
        return
    if _running_loop() is None:
        engine.loop.run_until_complete(work)
        return
    # A free lock of asyncio is taken without a loop; one that is held could only come free in the
    # loop, which waits for us.
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise RuntimeError(
        f"{op}: SGLang's adapter registry must be free, got it in use by a load, an unload or a "
        "request that waits in this event loop; await those and call again."
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
