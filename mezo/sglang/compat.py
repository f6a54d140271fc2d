"""The differences between SGLang 0.5.17 and 0.5.23 that concern us, by feature, in one place."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams

# 0.5.17 keeps an extend range and a row number on the request; later ones a KV record.
_HAS_EXTEND_RANGE = hasattr(Req, "set_extend_range")


def scoring_request(rid: str, tokens: Sequence[int], lora_id: str | None, first: int) -> Any:
    """Return a request that asks for log-likelihoods of ``tokens[first + 1:]`` and no new token.

    With ``first = len(tokens)`` it asks for none; the logits behind its last token come anyway.
    """
    request = Req(
        rid=rid,
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        return_logprob=first < len(tokens),
        lora_id=lora_id,
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = first
    if _HAS_EXTEND_RANGE:
        request.set_extend_range(0, len(tokens))
    else:
        request.extend_end = len(tokens)
    return request


def prepare_extend(scheduler: Any, requests: list[Any]) -> tuple[Any, Any]:
    """Allocate KV and request slots for whole requests; returns (ScheduleBatch, ForwardBatch)."""
    runner = model_runner(scheduler)
    batch = ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=scheduler.spec_algorithm,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    return batch, ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)


def release(scheduler: Any, batch: Any) -> None:
    """Give back the KV and request slots of a batch without inserting anything in the cache."""
    scheduler.token_to_kv_pool_allocator.free(batch.out_cache_loc)
    for request in batch.reqs:
        scheduler.req_to_token_pool.free(request)
        if not _HAS_EXTEND_RANGE:
            request.kv.mark_kv_released()


def model_runner(scheduler: Any) -> Any:
    """The rank's ModelRunner."""
    return scheduler.tp_worker.model_runner


def send(socket: Any, message: Any) -> None:
    """Send a message to the schedulers, as Engine.collective_rpc does."""
    try:
        from sglang.srt.managers.io_struct import sock_send
    except ImportError:
        socket.send_pyobj(message)
        return
    sock_send(socket, message)


def receive(socket: Any) -> Any:
    """Receive the reply to `send`."""
    try:
        from sglang.srt.managers.io_struct import sock_recv
    except ImportError:
        return socket.recv_pyobj()
    return sock_recv(socket)


def fetch_adapters(manager: Any, uids: set[str]) -> None:
    """Load adapters into slots of the pool; pinned ones stay there."""
    # The pool must not evict what is not named, so adapters go in one at a time.
    for uid in sorted(uids):
        manager.fetch_new_loras({uid}, set())


def free_memory(scheduler: Any) -> dict[str, int]:
    """KV tokens that are free, that the cache may evict and that it must keep; request slots."""
    tree = scheduler.tree_cache
    return {
        "kv_tokens": int(scheduler.token_to_kv_pool_allocator.available_size()),
        "evictable_tokens": int(tree.evictable_size()),
        "protected_tokens": int(tree.protected_size()),
        "request_slots": int(scheduler.req_to_token_pool.available_size()),
    }
