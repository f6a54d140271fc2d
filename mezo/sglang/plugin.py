"""The entry point of group `sglang.srt.plugins`: puts our worker into every scheduler process."""

from __future__ import annotations

from typing import Any

from mezo.sglang.cpu_host import unpin_lora_memory


def register() -> None:
    """Register our hooks; SGLang calls this once in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    unpin_lora_memory()
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.handle_rpc_request",
        _handle_rpc_request,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.managers.schedule_batch.Req.__init__", _after_req_init, HookType.AFTER
    )
    HookRegistry.register(
        "sglang.srt.lora.lora_manager.LoRAManager.prepare_lora_batch",
        _before_lora_batch,
        HookType.BEFORE,
    )


def _handle_rpc_request(original: Any, scheduler: Any, request: Any) -> Any:
    """Answer our messages; every other one goes to SGLang."""
    from mezo.sglang import worker

    if request.method != worker.METHOD:
        return original(scheduler, request)
    return worker.handle(scheduler, request)


def _after_req_init(_: None, req: Any, *args: Any, **kwargs: Any) -> None:
    """Keep KV made under one version of a trained adapter apart from the next version's."""
    from mezo.sglang import worker

    version = worker.served_version(req.lora_id)
    if version is not None:
        req.extra_key = f"{req.extra_key or ''}@mezo{version}"


def _before_lora_batch(_: Any, forward_batch: Any) -> None:
    """Bring the slot of a trained adapter up to date before a batch reads it."""
    from mezo.sglang import worker

    worker.publish_served(forward_batch.lora_ids)
