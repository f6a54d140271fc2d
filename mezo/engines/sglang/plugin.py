"""The entry point of group `sglang.srt.plugins`: puts our worker into every scheduler process."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

from mezo._logging import show_warnings
from mezo._signals import leave_interrupts_to_the_parent
from mezo.engines.sglang import adapter_files
from mezo.engines.sglang.batch import attention
from mezo.engines.sglang.cpu_host.host import unpin_lora_memory


def register() -> None:
    """Register our hooks; SGLang calls this once in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if multiprocessing.parent_process() is not None:  # not the caller's own process
        show_warnings()
    unpin_lora_memory()
    attention.register_backend()
    HookRegistry.register(_resolution_of_arguments(), attention.resolve_name, HookType.BEFORE)
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.handle_rpc_request",
        _handle_rpc_request,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.__init__", _after_scheduler_init, HookType.AFTER
    )
    HookRegistry.register(
        "sglang.srt.managers.detokenizer_manager.DetokenizerManager.__init__",
        _after_detokenizer_init,
        HookType.AFTER,
    )
    request = "sglang.srt.managers.schedule_batch.Req"
    HookRegistry.register(f"{request}.__init__", _after_req_init, HookType.AFTER)
    HookRegistry.register(f"{request}.init_next_round_input", _before_match, HookType.BEFORE)
    if _has_match_limit():
        HookRegistry.register(f"{request}._compute_max_prefix_len", _after_limit, HookType.AFTER)
    if _makes_replies():
        HookRegistry.register(
            "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
            _around_meta_info,
            HookType.AROUND,
        )
    HookRegistry.register(
        "sglang.srt.lora.lora_manager.LoRAManager.__init__", _before_lora_manager, HookType.BEFORE
    )
    HookRegistry.register(
        "sglang.srt.lora.lora_manager.LoRAManager.prepare_lora_batch",
        _before_lora_batch,
        HookType.BEFORE,
    )
    for target, hook, kind in adapter_files.hooks():
        HookRegistry.register(target, hook, HookType[kind])


def _handle_rpc_request(original: Any, scheduler: Any, request: Any) -> Any:
    """Answer our messages; every other one goes to SGLang."""
    from mezo.core.messages import METHOD
    from mezo.engines.sglang import worker

    if request.method != METHOD:
        return original(scheduler, request)
    return worker.handle(scheduler, request)


def _resolution_of_arguments() -> str:
    """Where SGLang derives settings from new server arguments."""
    from sglang.srt.server_args import ServerArgs

    name = "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"
    return f"sglang.srt.server_args.ServerArgs.{name}"


def _has_match_limit() -> bool:
    from sglang.srt.managers.schedule_batch import Req

    return hasattr(Req, "_compute_max_prefix_len")


def _makes_replies() -> bool:
    """Whether this is the caller's process, of an SGLang whose replies may hold more."""
    module = sys.modules.get("sglang.srt.managers.tokenizer_manager")
    return hasattr(getattr(module, "TokenizerManager", None), "update_request_meta_info")


def _around_meta_info(original: Any, *args: Any, **kwargs: Any) -> None:
    """Let a reply say that an activated adapter's invocation was missing."""
    from mezo.engines.sglang import serve_alora

    serve_alora.tell_missing(original, *args, **kwargs)


def _after_scheduler_init(_: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Let requests of activated adapters find their scheduler."""
    from mezo.engines.sglang import serve_alora

    serve_alora.remember(scheduler)
    leave_interrupts_to_the_parent()


def _after_detokenizer_init(*_: Any, **__: Any) -> None:
    """As in the schedulers; 0.5.17 loads no plugins there."""
    leave_interrupts_to_the_parent()


def _after_req_init(_: None, req: Any, *args: Any, **kwargs: Any) -> None:
    """Keep KV of an adapter in training apart by version; split requests of activated adapters."""
    from mezo.engines.sglang import serve_alora, trained

    serve_alora.prepare_request(req, kwargs.get("extra_key"))
    req.mezo_plain_key = None
    if trained.served_version(req.lora_id) is not None and req.mezo_prefix_len is None:
        req.mezo_plain_key = req.extra_key or ""
        _set_version(req)


def _set_version(req: Any) -> None:
    """Put the version of the weights into a request's key; its KV is found by equal ones only."""
    from mezo.engines.sglang import trained

    version = trained.served_version(req.lora_id)
    if version is not None and getattr(req, "mezo_plain_key", None) is not None:
        req.extra_key = f"{req.mezo_plain_key}@mezo{version}"


def _before_match(req: Any, tree_cache: Any = None, *args: Any, **kwargs: Any) -> None:
    """Have an activated adapter's prefix in the cache before it is looked up there.

    A request may have waited while its adapter was updated, and will run under the new weights.
    """
    from mezo.engines.sglang import compat, serve_alora

    if not compat.has_kv(req):
        _set_version(req)
    serve_alora.complete_prefix(req, tree_cache)


def _after_limit(length: int, req: Any, *args: Any, **kwargs: Any) -> int:
    """End an activated adapter's match where its invocation begins."""
    from mezo.engines.sglang import serve_alora

    return serve_alora.limit_match(length, req)


def _before_lora_manager(_: Any, base_model: Any, *args: Any, **kwargs: Any) -> None:
    """Tell SGLang the sizes of OPT's linear layers, which it asks each model for but this one."""
    cls = type(base_model)
    if cls.__name__ == "OPTForCausalLM" and not hasattr(cls, "get_hidden_dim"):
        cls.get_hidden_dim = _opt_hidden_dim


def _opt_hidden_dim(model: Any, name: str, layer: int) -> tuple[int, int]:
    """(input, output) features of an OPT linear layer."""
    hidden, ffn = model.config.hidden_size, model.config.ffn_dim
    sizes = {"qkv_proj": (hidden, 3 * hidden), "out_proj": (hidden, hidden)}
    return {**sizes, "fc1": (hidden, ffn), "fc2": (ffn, hidden)}[name]


def _before_lora_batch(_: Any, forward_batch: Any) -> None:
    """Bring the slot of a trained adapter up to date before a batch reads it."""
    from mezo.engines.sglang import trained

    trained.sync(forward_batch.lora_ids)
