"""The entry point of group `sglang.srt.plugins`: it registers our hooks in SGLang's processes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mezo._logging import show_warnings
from mezo._signals import leave_interrupts_to_the_parent
from mezo.engines.sglang import adapter_files
from mezo.engines.sglang.batch import attention
from mezo.engines.sglang.cpu_host.host import unpin_lora_memory
from mezo.engines.sglang.engine import offer_finetune
from mezo.engines.sglang.eras import ERA

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.io_struct import RpcReqInput, RpcReqOutput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.models.opt import OPTForCausalLM, OPTModel


def register() -> None:
    """Register our hooks; SGLang calls this once in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if multiprocessing.parent_process() is not None:  # not the caller's own process
        show_warnings()
    offer_finetune()
    unpin_lora_memory()
    attention.register_backend()
    HookRegistry.register(
        f"sglang.srt.server_args.ServerArgs.{ERA.resolution}",
        attention.resolve_name,
        HookType.BEFORE,
    )
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
    HookRegistry.register(f"{request}._compute_max_prefix_len", _after_limit, HookType.AFTER)
    # Only the caller's process makes replies; the import of that module is slow elsewhere.
    if ERA.tells_meta_info and "sglang.srt.managers.tokenizer_manager" in sys.modules:
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


def _handle_rpc_request(
    original: Callable[[Scheduler, RpcReqInput], RpcReqOutput],
    scheduler: Scheduler,
    request: RpcReqInput,
) -> RpcReqOutput:
    """Answer our messages; every other one goes to SGLang."""
    from mezo.core.messages import METHOD
    from mezo.engines.sglang import worker

    if request.method != METHOD:
        return original(scheduler, request)
    return worker.handle(scheduler, request)


def _around_meta_info(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Let a reply say that an activated adapter's invocation was missing."""
    from mezo.engines.sglang import serve_alora

    serve_alora.tell_missing(original, *args, **kwargs)


def _after_scheduler_init(_: None, scheduler: Scheduler, *args: object, **kwargs: object) -> None:
    """Let requests of activated adapters find their scheduler."""
    from mezo.engines.sglang import serve_alora

    serve_alora.remember(scheduler)
    leave_interrupts_to_the_parent()


def _after_detokenizer_init(*_: object, **__: object) -> None:
    """As in the schedulers; 0.5.17 loads no plugins there."""
    leave_interrupts_to_the_parent()


def _after_req_init(
    _: None, req: Req, *args: object, extra_key: str | None = None, **kwargs: object
) -> None:
    """Keep KV of an adapter in training apart by version; split requests of activated adapters."""
    from mezo.engines.sglang import serve_alora, trained

    serve_alora.prepare_request(req, extra_key)
    req.mezo_plain_key = None
    if trained.served_version(req.lora_id) is not None and req.mezo_prefix_len is None:
        req.mezo_plain_key = req.extra_key or ""
        _set_version(req)


def _set_version(req: Req) -> None:
    """Put the version of the weights into a request's key; its KV is found by equal ones only."""
    from mezo.engines.sglang import trained

    version = trained.served_version(req.lora_id)
    if version is not None and getattr(req, "mezo_plain_key", None) is not None:
        req.extra_key = f"{req.mezo_plain_key}@mezo{version}"


def _before_match(
    req: Req, tree_cache: BasePrefixCache | None = None, *args: object, **kwargs: object
) -> None:
    """Have an activated adapter's prefix in the cache before it is looked up there.

    A request may have waited while its adapter was updated, and will run under the new weights.
    """
    from mezo.engines.sglang import compat, serve_alora

    if not compat.has_kv(req):
        _set_version(req)
    serve_alora.complete_prefix(req, tree_cache)


def _after_limit(length: int, req: Req, *args: object, **kwargs: object) -> int:
    """End an activated adapter's match where its invocation begins."""
    from mezo.engines.sglang import serve_alora

    return serve_alora.limit_match(length, req)


def _before_lora_manager(
    _: object, base_model: torch.nn.Module, *args: object, **kwargs: object
) -> None:
    """Tell SGLang what it asks every model for and does not find in OPT.

    These are the sizes of its linear layers, for LoRA; and for prefill graphs the list of its
    layers, and a call of them without what another pipeline stage would send.
    """
    cls = type(base_model)
    if cls.__name__ != "OPTForCausalLM":
        return
    if not hasattr(cls, "get_hidden_dim"):
        cls.get_hidden_dim = _opt_hidden_dim  # type: ignore[attr-defined]
    inner: Any = type(base_model.model)
    if not hasattr(base_model.model, "layers"):
        inner.layers = property(_opt_layers)
        if inner.forward.__defaults__ == (None,):  # of input_embeds, the last parameter
            inner.forward.__defaults__ = (None, None)


def _opt_layers(model: OPTModel) -> torch.nn.ModuleList:
    """The layers, which OPT keeps in its decoder."""
    layers: torch.nn.ModuleList = model.decoder.layers
    return layers


def _opt_hidden_dim(model: OPTForCausalLM, name: str, layer: int) -> tuple[int, int]:
    """(input, output) features of an OPT linear layer."""
    hidden, ffn = model.config.hidden_size, model.config.ffn_dim
    sizes = {"qkv_proj": (hidden, 3 * hidden), "out_proj": (hidden, hidden)}
    return {**sizes, "fc1": (hidden, ffn), "fc2": (ffn, hidden)}[name]


def _before_lora_batch(_: object, forward_batch: ForwardBatch) -> None:
    """Bring the slot of a trained adapter up to date before a batch reads it."""
    from mezo.engines.sglang import trained

    trained.sync(forward_batch.lora_ids)
