"""SGLang's objects by what MeZO needs of them: `Rank` for a scheduler, functions for requests.

What differs between versions is in `eras`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.io_struct import sock_recv, sock_send
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams

from mezo.engines.sglang.eras import ERA, CachedPrefix

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.lora.mem_pool import LoRAMemoryPool
    from sglang.srt.managers.io_struct import RpcReqInput, RpcReqOutput
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.memory_pool import KVCache
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs
    from zmq.sugar.socket import Socket


class Rank:
    """One tensor-parallel rank: the scheduler of this process, by what MeZO uses of it.

    It keeps nothing of its own, so that a second one around the same scheduler is the same.

    Args:
        scheduler: SGLang's.

    Attributes:
        scheduler: the same.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    @property
    def runner(self) -> ModelRunner:
        """What runs the model."""
        return self.scheduler.tp_worker.model_runner

    @property
    def model(self) -> torch.nn.Module:
        """The model."""
        model: torch.nn.Module = self.runner.model
        return model

    @property
    def device(self) -> str:
        """Type of the device that the model runs on, such as "cuda"."""
        return str(self.runner.device)

    @property
    def server_args(self) -> ServerArgs:
        """The arguments that the engine was started with."""
        return self.scheduler.server_args

    @property
    def tp_group(self) -> GroupCoordinator:
        """The tensor-parallel ranks."""
        return self.scheduler.tp_group

    @property
    def page_size(self) -> int:
        """KV slots of a page."""
        return int(self.scheduler.page_size)

    # Adapters.

    @property
    def lora_manager(self) -> LoRAManager:
        """What loads adapters."""
        return self.runner.lora_manager

    @property
    def lora_pool(self) -> LoRAMemoryPool:
        """The pool of adapter slots."""
        return self.lora_manager.memory_pool

    @property
    def lora_names(self) -> dict[str, str]:
        """{uid: name} of the adapters that are loaded."""
        refs: dict[str, LoRARef] = self.lora_manager.lora_refs
        return {uid: str(ref.lora_name) for uid, ref in refs.items()}

    def load_adapters(self, uids: Iterable[str]) -> None:
        """Load adapters into slots of the pool; pinned ones stay there."""
        # The pool must not evict what is not named, so adapters go in one at a time.
        for uid in sorted(uids):
            self.lora_manager.fetch_new_loras({uid}, set())

    def slot_tensors(self, slot: int) -> list[torch.Tensor]:
        """All that an adapter slot holds, module by module: what a forward may read of it."""
        pool = self.lora_pool
        buffers = (pool.A_buffer, pool.B_buffer)
        return [layer[slot] for b in buffers for name in sorted(b) for layer in b[name]]

    # Batches.

    def allocate(self, requests: list[Req]) -> ScheduleBatch:
        """Allocate KV and request slots for whole requests; returns their batch."""
        scheduler = self.scheduler
        batch = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=_NamedSlots(scheduler.tree_cache),
            model_config=self.runner.model_config,
            enable_overlap=False,
            spec_algorithm=scheduler.spec_algorithm,
        )
        try:
            batch.prepare_for_extend()
        except BaseException:
            # SGLang allocates request slots first, and keeps them when there is no KV for them.
            for request in requests:
                if has_kv(request):
                    self.free_req_slot(request)
            raise
        return batch

    def forward_batch(self, batch: ScheduleBatch) -> ForwardBatch:
        """What the model runner needs of an allocated batch."""
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        return ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)

    def release(self, batch: ScheduleBatch) -> None:
        """Give back what a batch allocated, its own KV and its request slots, inserting nothing."""
        self.free_kv_slots(batch.out_cache_loc)
        for request in batch.reqs:
            self.free_req_slot(request)

    def free_req_slot(self, request: Req) -> None:
        """Give back a request slot; its KV belongs to somebody else by now."""
        self.scheduler.req_to_token_pool.free(request)
        ERA.mark_released(request)

    # The radix cache.

    @property
    def tree(self) -> BasePrefixCache:
        """The radix cache."""
        return self.scheduler.tree_cache

    def match(self, tokens: Sequence[int]) -> CachedPrefix:
        """Look tokens up in the cache; see `match`."""
        return match(self.tree, tokens)

    def cached_kv_slots(self, prefix: CachedPrefix) -> torch.Tensor:
        """KV slots of what was found."""
        return ERA.kv_slots(self.tree, prefix)

    def lock(self, prefix: CachedPrefix) -> object:
        """Keep a prefix from eviction; returns what `unlock` needs."""
        return ERA.lock(self.tree, prefix.node)

    def unlock(self, handle: object) -> None:
        """Undo `lock`."""
        ERA.unlock(self.tree, handle)

    def insert(self, tokens: Sequence[int], kv_slots: torch.Tensor, num_cached: int) -> None:
        """Hand the KV of tokens to the cache under the base model's key.

        Args:
            tokens: the tokens.
            kv_slots: their KV slots.
            num_cached: leading slots that belong to the cache already. Slots behind them whose
                tokens the cache has got from somebody else meanwhile are freed.
        """
        params = InsertParams(key=_key(tokens), value=kv_slots, prev_prefix_len=num_cached)
        known = int(self.tree.insert(params).prefix_len)
        # A `UnifiedRadixCache` frees duplicates itself; an engine may have another kind of cache.
        if not hasattr(self.tree, "tree_core"):
            self.free_kv_slots(kv_slots[num_cached:known])

    # KV slots.

    def kv_slots(self, request: Req, length: int) -> torch.Tensor:
        """KV slots of a request's first tokens."""
        table = self.scheduler.req_to_token_pool.req_to_token
        slots: torch.Tensor = table[ERA.req_slot(request), :length]
        return slots.to(torch.int64, copy=True)

    def use_kv_slots(self, request: Req, kv_slots: torch.Tensor) -> None:
        """Let a request use the KV of its first tokens in slots that somebody else keeps."""
        root = self.match(()).node
        ERA.use_prefix(request, CachedPrefix(len(kv_slots), root, kv_slots))
        request.mezo_kv_slots = kv_slots

    def alloc_pages(self, count: int) -> torch.Tensor:
        """Allocate whole pages of KV slots, evicting what the cache may lose.

        Returns:
            `[count, page_size]`.

        Raises:
            RuntimeError: there are not that many.
        """
        size = self.page_size
        evict_from_tree_cache(self.tree, count * size)
        slots: torch.Tensor | None = self.scheduler.token_to_kv_pool_allocator.alloc(count * size)
        if slots is None:
            raise RuntimeError(
                f"a batch must have {count} free pages of {size} KV slots, got fewer; "
                "start the engine with a larger max_total_tokens."
            )
        return slots.reshape(count, size)

    def free_kv_slots(self, kv_slots: torch.Tensor) -> None:
        """Give back KV slots, whole pages of them."""
        self.scheduler.token_to_kv_pool_allocator.free(kv_slots)

    @property
    def kv_pool(self) -> KVCache:
        """The keys and values of every layer."""
        return self.scheduler.token_to_kv_pool_allocator.get_kvcache()

    def copy_kv(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy the KV of every layer from slots to other slots."""
        if to.device.type != "cpu":
            self.kv_pool.move_kv_cache(to, source)
            return
        for name in ("k_buffer", "v_buffer", "kv_buffer"):  # SGLang's own has no kernel there
            for buffer in getattr(self.kv_pool, name, ()):
                buffer[to] = buffer[source]

    # Memory.

    def free_memory(self) -> dict[str, int]:
        """KV tokens: free, evictable and protected ones of the cache; and free request slots."""
        return {
            "kv_tokens": int(self.scheduler.token_to_kv_pool_allocator.available_size()),
            "evictable_tokens": int(self.tree.evictable_size()),
            "protected_tokens": int(self.tree.protected_size()),
            "request_slots": int(self.scheduler.req_to_token_pool.available_size()),
        }

    @property
    def budget(self) -> tuple[int, int]:
        """Tokens and sequences that one scoring batch may have now."""
        free = self.free_memory()
        limit = int(self.server_args.max_prefill_tokens)
        return min(free["kv_tokens"] + free["evictable_tokens"], limit), free["request_slots"]

    @property
    def largest_budget(self) -> tuple[int, int]:
        """Tokens and sequences that one scoring batch may have in an idle engine."""
        tokens = min(self.scheduler.max_total_num_tokens, self.server_args.max_prefill_tokens)
        return int(tokens), int(self.scheduler.req_to_token_pool.size)


class _NamedSlots:
    """The radix cache, but for requests that name their prefix's KV slots themselves (0.5.22)."""

    def __init__(self, tree: BasePrefixCache) -> None:
        self._tree = tree

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tree, name)

    def prefix_device_indices(self, request: Req) -> torch.Tensor:
        named: torch.Tensor | None = getattr(request, "mezo_kv_slots", None)
        return self._tree.prefix_device_indices(request) if named is None else named


def scoring_request(rid: str, tokens: Sequence[int], lora_id: str | None) -> Req:
    """Return a request that runs tokens and asks for nothing; its scores are read elsewhere."""
    request = _request(rid, tokens, None)
    request.lora_id = lora_id  # set after `Req.__init__`, whose hooks are for requests from outside
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = len(tokens)
    ERA.run_from(request, 0)
    return request


def served_request(rid: str, tokens: Sequence[int], lora_id: str | None) -> Req:
    """Return a request as SGLang makes one for ``lora_id``, with all that we do to those."""
    return _request(rid, tokens, lora_id)


def _request(rid: str, tokens: Sequence[int], lora_id: str | None) -> Req:
    return Req(
        rid=rid,
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        lora_id=lora_id,
    )


def has_kv(request: Req) -> bool:
    """Whether a request has begun to run."""
    return ERA.req_slot(request) is not None


def match_limit(request: Req, length: int) -> int:
    """The longest match that a request accepts."""
    return int(request._compute_max_prefix_len(length))


def match(tree: BasePrefixCache, tokens: Sequence[int]) -> CachedPrefix:
    """Look tokens up in a cache under the base model's key."""
    return ERA.prefix_of(tree.match_prefix(MatchPrefixParams(key=_key(tokens))))


def _key(tokens: Sequence[int]) -> RadixKey:
    return RadixKey(array("q", tokens), extra_key=None)


def scratch_tree(page_size: int) -> RadixCache:
    """Return an empty radix cache that owns no memory: to look keys up in, then throw away."""
    return RadixCache.create_simulated(page_size=page_size)


def keep(tree: RadixCache, request: Req, tokens: Sequence[int]) -> None:
    """Put tokens into a `scratch_tree` under the key of a request that ran them."""
    key = RadixKey(array("q", tokens), extra_key=request.extra_key)
    tree.insert(InsertParams(key=key, value=torch.arange(len(tokens))))


def cached_tokens(request: Req, tree: RadixCache) -> int:
    """How many of its tokens a request about to be scheduled finds in a cache."""
    request.init_next_round_input(tree)
    return ERA.cached_tokens(request)


def send(socket: Socket[bytes], message: RpcReqInput) -> None:
    """Send a message to the schedulers, as Engine.collective_rpc does."""
    sock_send(socket, message)


def receive(socket: Socket[bytes]) -> RpcReqOutput:
    """Receive the reply to `send`."""
    return sock_recv(socket)
