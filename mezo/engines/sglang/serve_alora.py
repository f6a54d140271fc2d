"""Serves activated LoRA adapters in SGLang, which knows none: ours, and any other that is loaded.

An activated adapter (arXiv 2504.12397; PEFT's `alora_invocation_tokens`) acts from the last
occurrence of its invocation in the prompt on. Everything before runs on the base model, and its KV
lies in the radix cache under the base model's key. A request for such an adapter

- uses the KV of its first tokens from there, and of nothing behind the invocation's beginning;
- has the missing part of them computed on the base model when it is about to be scheduled;
- never puts KV of its own into the cache;
- is a base-model request when its prompt holds no invocation, as in PEFT; its reply says so in
  ``meta_info["mezo_invocation_missing"]``, and the log once for each adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist

from mezo.data.encode import last_occurrence
from mezo.engines.sglang import compat
from mezo.engines.sglang.batch import prefix
from mezo.engines.sglang.compat import Rank
from mezo.engines.sglang.eras import ERA

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

# In the `meta_info` of a reply: 1 where the base model answered for an activated adapter.
MISSING = "mezo_invocation_missing"

logger = logging.getLogger(__name__)
_rank: Rank | None = None
_warned: set[str] = set()


class _InEveryChunk(list[int]):
    """What SGLang cuts a reply's part from, token by token: 1 in every part, however long."""

    def __getitem__(self, part: object) -> list[int]:  # type: ignore[override]
        return [1]


def remember(scheduler: Scheduler) -> None:
    """Keep the process's scheduler: requests do not know it."""
    global _rank
    _rank = Rank(scheduler)


def _this_rank() -> Rank:
    assert _rank is not None, "requests are scheduled by a scheduler"
    return _rank


def check_servable(rank: Rank) -> None:
    """Raise unless activated adapters can be served by this engine.

    Raises:
        NotImplementedError: an older SGLang, the overlap scheduler, or an unsuitable cache.
    """
    prefix.check_cache(rank)
    if rank.page_size != 1:
        raise NotImplementedError(
            f"serving an activated adapter must have pages of one token, got page_size "
            f"{rank.page_size}; start the engine with page_size=1."
        )
    if not ERA.serves_activated:
        raise NotImplementedError(
            "serving an activated adapter must have an SGLang whose requests can stay out of the "
            "radix cache, got an older one; use 0.5.23."
        )
    if rank.scheduler.enable_overlap:
        raise NotImplementedError(
            "serving an activated adapter must have the overlap scheduler off, got it on; start "
            "the engine with disable_overlap_schedule=True."
        )


def why_not_servable(rank: Rank) -> str | None:
    """Return what `check_servable` would say, or None."""
    try:
        check_servable(rank)
    except NotImplementedError as error:
        return str(error)
    return None


def prepare_request(request: Req, extra_key: str | None) -> None:
    """Split a new request of an activated adapter at its invocation.

    Args:
        request: a `Req` that was just made.
        extra_key: what its caller gave; SGLang has added the adapter's id to it.
    """
    request.mezo_prefix_len = None
    invocation = _invocation(request.lora_id)
    if invocation is None:
        return
    start = last_occurrence(request.origin_input_ids, invocation)
    request.extra_key = extra_key
    if start is None:
        _say_missing(request, invocation)
        request.lora_id = None
        return
    if reason := why_not_servable(_this_rank()):
        request.set_finish_with_abort(reason)
        return
    request.mezo_prefix_len = start
    request.skip_radix_cache_insert = True


def tell_missing(
    original: Callable[..., None],
    manager: TokenizerManager,
    meta_info: dict[str, object],
    state: ReqState,
    customized_info: dict[str, list[list[int]]],
    index: int,
    *args: object,
) -> None:
    """Put a missing invocation into a reply's meta_info (`update_request_meta_info`).

    Args:
        original: SGLang's own, for the other fields.
        manager: the TokenizerManager.
        meta_info: what the request's reply says.
        state: the request's state.
        customized_info: {field: a value of each request of the message}.
        index: the request's place in the message.
        args: the rest, for SGLang.
    """
    others = dict(customized_info)
    ours = others.pop(MISSING, None)
    if ours is not None and any(ours[index]):
        meta_info[MISSING] = 1
    if others:
        original(manager, meta_info, state, others, index, *args)


def limit_match(length: int, request: Req) -> int:
    """Keep a cache match from going beyond the invocation's beginning."""
    limit: int | None = getattr(request, "mezo_prefix_len", None)
    return length if limit is None else min(length, limit)


def complete_prefix(request: Req, tree_cache: BasePrefixCache | None) -> None:
    """Compute what the cache lacks of a request's prefix, on the base model."""
    length: int | None = getattr(request, "mezo_prefix_len", None)
    if not length or tree_cache is None:
        return
    if request.return_logprob and 0 <= request.logprob_start_len < length:
        # Log-likelihoods of the prefix would have it computed again, under the adapter.
        request.logprob_start_len = length
    tokens = tuple(request.origin_input_ids[:length])
    missing = length - compat.match(tree_cache, tokens).length
    if missing == 0:
        return
    free = _this_rank().free_memory()
    if missing > free["kv_tokens"] + free["evictable_tokens"] or not free["request_slots"]:
        request.mezo_prefix_len = None
        request.set_finish_with_abort(
            f"the prompt of an activated adapter must fit into the KV cache, got {missing} tokens "
            f"for {free['kv_tokens'] + free['evictable_tokens']} free ones; send it again later."
        )
        return
    with prefix.cached(_this_rank(), [tokens]):
        pass  # computed and inserted; the request's own match locks it next


def _say_missing(request: Req, invocation: list[int]) -> None:
    """Have the reply say that the base model answers, and the log, once for an adapter."""
    request.customized_info = {**(request.customized_info or {}), MISSING: _InEveryChunk()}
    is_first_rank = dist.get_rank(_this_rank().tp_group.cpu_group) == 0
    if request.lora_id in _warned or not is_first_rank:
        return
    _warned.add(request.lora_id)
    name = _this_rank().lora_names[request.lora_id]
    logger.warning(
        "adapter %r: a prompt must hold the invocation's tokens %s, got one without them; the base "
        "model answers it, as in PEFT; tokenise prompt and invocation as one text, the invocation "
        'last. Said once; every such reply has meta_info["%s"].',
        name,
        invocation,
        MISSING,
    )


def _invocation(lora_id: str | None) -> list[int] | None:
    """The invocation tokens of a loaded adapter, if it is an activated one."""
    if lora_id is None or _rank is None:
        return None
    config = _rank.lora_manager.configs.get(lora_id)
    tokens = config.hf_config.get("alora_invocation_tokens") if config is not None else None
    return list(tokens) if tokens else None
