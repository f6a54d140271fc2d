"""The differences between SGLang 0.5.17 and 0.5.23 that concern us, by feature, in one place."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams

# 0.5.17 keeps an extend range and a row number on the request; later ones a KV record.
_HAS_EXTEND_RANGE = hasattr(Req, "set_extend_range")

# Requests that stay out of the radix cache, and one place that limits their match.
CAN_SERVE_ACTIVATED = hasattr(Req, "_compute_max_prefix_len") and not _HAS_EXTEND_RANGE


def scoring_request(rid: str, tokens: Sequence[int], lora_id: str | None) -> Any:
    """Return a request that runs tokens and asks for nothing; what it is for is read elsewhere."""
    request = Req(
        rid=rid,
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
    )
    request.lora_id = lora_id  # named late: what we do to requests from outside is not for ours
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = len(tokens)
    if _HAS_EXTEND_RANGE:
        request.set_extend_range(0, len(tokens))
    else:
        request.extend_end = len(tokens)
    return request


def served_request(rid: str, tokens: Sequence[int], lora_id: str | None) -> Any:
    """Return a request as SGLang makes one for ``lora_id``, with all that we do to those."""
    return Req(
        rid=rid,
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        lora_id=lora_id,
    )


def scratch_tree(page_size: int) -> Any:
    """Return an empty radix cache that owns no memory: to look keys up in, then throw away."""
    return RadixCache.create_simulated(page_size=page_size)


def keep(tree: Any, request: Any, tokens: Sequence[int]) -> None:
    """Put tokens into a `scratch_tree` under the key of a request that ran them."""
    key = RadixKey(array("q", tokens), extra_key=request.extra_key)
    tree.insert(InsertParams(key=key, value=torch.arange(len(tokens))))


def cached_tokens(request: Any, tree: Any) -> int:
    """How many of its tokens a request about to be scheduled finds in a cache."""
    request.init_next_round_input(tree)
    return len(request.prefix_indices) if _HAS_EXTEND_RANGE else int(request.prefix_len)


def match_limit(request: Any, length: int) -> int:
    """The longest match that a request takes; needs `CAN_SERVE_ACTIVATED`."""
    return int(request._compute_max_prefix_len(length))


class _NamedSlots:
    """The radix cache, but for requests that name their prefix's KV slots themselves (0.5.23)."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tree, name)

    def prefix_device_indices(self, request: Any) -> torch.Tensor:
        slots: torch.Tensor | None = getattr(request, "mezo_slots", None)
        return self._tree.prefix_device_indices(request) if slots is None else slots


def allocate(scheduler: Any, requests: list[Any]) -> Any:
    """Allocate KV and request slots for whole requests; returns their ScheduleBatch."""
    batch = ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=_NamedSlots(scheduler.tree_cache),
        model_config=model_runner(scheduler).model_config,
        enable_overlap=False,
        spec_algorithm=scheduler.spec_algorithm,
    )
    try:
        batch.prepare_for_extend()
    except BaseException:
        # Request slots come first, and stay taken when there is no KV for them.
        for request in requests:
            if _row(request) is not None:
                free_row(scheduler, request)
        raise
    return batch


def forward_batch_of(scheduler: Any, batch: Any) -> Any:
    """What the model runner takes of an allocated batch."""
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    return ForwardBatch.init_new(
        batch, model_runner(scheduler), return_hidden_states_before_norm=False
    )


def release(scheduler: Any, batch: Any) -> None:
    """Give back what a batch allocated, its own KV and its request slots, inserting nothing."""
    scheduler.token_to_kv_pool_allocator.free(batch.out_cache_loc)
    for request in batch.reqs:
        free_row(scheduler, request)


def free_row(scheduler: Any, request: Any) -> None:
    """Give back a request slot; its KV is somebody else's by now."""
    scheduler.req_to_token_pool.free(request)
    if not _HAS_EXTEND_RANGE:
        request.kv.mark_kv_released()


@dataclass(frozen=True)
class Hit:
    """The part of a prompt that is in the radix cache under the base model's key.

    Args:
        length: tokens of it; whole pages.
        node: the cache's node that ends it.
        slots: its KV slots where a request must name them (0.5.17), else None.
    """

    length: int
    node: Any
    slots: torch.Tensor | None


def match(tree: Any, tokens: Sequence[int]) -> Hit:
    """Look tokens up under the base model's key."""
    found = tree.match_prefix(MatchPrefixParams(key=_key(tokens)))
    if _HAS_EXTEND_RANGE:
        return Hit(len(found.device_indices), found.last_device_node, found.device_indices)
    return Hit(int(found.device_prefix_len), found.last_device_node, None)


def slots_of(tree: Any, hit: Hit) -> torch.Tensor:
    """KV slots of what was found."""
    if hit.slots is not None:
        return hit.slots
    slots: torch.Tensor = tree.path_device_indices(hit.node)[: hit.length]
    return slots


def insert(scheduler: Any, tokens: Sequence[int], slots: torch.Tensor, shared: int) -> None:
    """Hand the KV of tokens to the cache under the base model's key.

    Args:
        scheduler: this rank's scheduler.
        tokens: the tokens.
        slots: their KV slots.
        shared: leading slots that are the cache's own already. Slots behind them whose tokens the
            cache has got from somebody else meanwhile are freed.
    """
    tree = scheduler.tree_cache
    params = InsertParams(key=_key(tokens), value=slots, prev_prefix_len=shared)
    known = int(tree.insert(params).prefix_len)
    if not hasattr(tree, "tree_core"):  # UnifiedRadixCache frees duplicates itself
        scheduler.token_to_kv_pool_allocator.free(slots[shared:known])


def lock(tree: Any, node: Any) -> Any:
    """Keep a node and its ancestors from eviction; returns what `unlock` takes."""
    if hasattr(tree, "lock"):
        return tree.lock(node)
    tree.inc_lock_ref(node)
    return node


def unlock(tree: Any, handle: Any) -> None:
    """Undo `lock`."""
    if hasattr(tree, "unlock"):
        tree.unlock(handle)
    else:
        tree.dec_lock_ref(handle)


def set_prefix(request: Any, hit: Hit) -> None:
    """Let a request take the KV of its first tokens from the cache.

    The request must never be inserted into the cache: its own tokens may be an adapter's.
    """
    if _HAS_EXTEND_RANGE:
        request.prefix_indices = hit.slots
        request.set_extend_range(hit.length, len(request.origin_input_ids))
        request.cache_protected_len = hit.length
    else:
        request.prefix_len = hit.length
        request.kv.cache_protected_len = hit.length
    request.last_node = request.last_host_node = request.best_match_node = hit.node


def set_slots(scheduler: Any, request: Any, slots: torch.Tensor) -> None:
    """Let a request take the KV of its first tokens from slots that somebody else keeps."""
    root = match(scheduler.tree_cache, ()).node
    set_prefix(request, Hit(len(slots), root, slots))
    request.mezo_slots = slots


def kv_slots(scheduler: Any, request: Any, length: int) -> torch.Tensor:
    """KV slots of a request's first tokens."""
    slots: torch.Tensor = scheduler.req_to_token_pool.req_to_token[_row(request), :length]
    return slots.to(torch.int64, copy=True)


def _row(request: Any) -> int | None:
    """A request's slot, or None before it has one."""
    row: int | None = request.req_pool_idx if _HAS_EXTEND_RANGE else request.kv.req_pool_idx
    return row


def has_kv(request: Any) -> bool:
    """Whether a request has begun to run."""
    return _row(request) is not None


def _key(tokens: Sequence[int]) -> Any:
    return RadixKey(array("q", tokens), extra_key=None)


def alloc_pages(scheduler: Any, count: int) -> torch.Tensor:
    """Take whole pages of KV slots, evicting what the cache may lose; `[count, page_size]`.

    Raises:
        RuntimeError: there are not that many.
    """
    page = int(scheduler.page_size)
    evict_from_tree_cache(scheduler.tree_cache, count * page)
    slots: torch.Tensor | None = scheduler.token_to_kv_pool_allocator.alloc(count * page)
    if slots is None:
        raise RuntimeError(
            f"a batch must have {count} free pages of {page} KV slots, got fewer; "
            "start the engine with a larger max_total_tokens."
        )
    return slots.reshape(count, page)


def free_slots(scheduler: Any, slots: torch.Tensor) -> None:
    """Give back KV slots, whole pages of them."""
    scheduler.token_to_kv_pool_allocator.free(slots)


def copy_kv(scheduler: Any, to: torch.Tensor, source: torch.Tensor) -> None:
    """Copy the KV of every layer from slots to other slots."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if to.device.type != "cpu":
        pool.move_kv_cache(to, source)
        return
    for name in ("k_buffer", "v_buffer", "kv_buffer"):  # SGLang's own has no kernel there
        for buffer in getattr(pool, name, ()):
            buffer[to] = buffer[source]


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
