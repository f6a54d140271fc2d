"""Prefixes of a scoring batch: cached ones in SGLang's radix cache, temporary ones outside of it.

A cached prefix is computed once on the base model and locked for a batch. An activated adapter acts
from the invocation on, so a prompt's KV is the base model's and serves every row, sign, direction,
option, step and epoch - and base-model requests, since it lies in the cache under their key. Under
memory pressure it is evicted like theirs, and computed again.

A temporary prefix is computed under an adapter for one batch, and its KV is freed afterwards.

With pages of several tokens the cache keeps whole pages only. A prompt's last page is then kept
under a key that is filled up with `_FILLER`, which no request can have. Each sequence that
continues the prompt gets a copy of that page's tokens in a page of its own, because sequences write
behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mezo.engines.sglang.batch import logprobs
from mezo.engines.sglang.compat import Rank, scoring_request
from mezo.engines.sglang.eras import ERA, CachedPrefix

Prompt = tuple[int, ...]
_FILLER = -1
# The uid of the adapter that a prompt runs under (None: the base model), and the prompt.
AdapterPrompt = tuple[str | None, Prompt]


@dataclass
class CachedPrefixes:
    """The prompts of a batch, all of them in the cache and locked.

    Args:
        found: where each prompt lies.
        kv_slots: KV slots of each prompt.
        computed: prompt tokens that had to be computed.
        forwards: forward batches that took.
    """

    found: dict[Prompt, CachedPrefix]
    kv_slots: dict[Prompt, torch.Tensor]
    computed: int = 0
    forwards: int = 0


def check_cache(rank: Rank) -> None:
    """Raise unless the engine has a cache that can keep prompts.

    Raises:
        NotImplementedError: the radix cache is off.
    """
    if rank.server_args.disable_radix_cache:
        raise NotImplementedError(
            "attach: prefix 'activated' keeps prompts in the radix cache, got "
            "disable_radix_cache=True; start the engine without it."
        )


@contextmanager
def cached(rank: Rank, prompts: Sequence[Prompt]) -> Iterator[CachedPrefixes]:
    """Hold prompts in the cache while a batch uses them, computing those that are not there.

    Args:
        rank: this rank.
        prompts: prompts without duplicates; empty ones are passed over.

    Yields:
        Where the prompts lie. All locks are given back afterwards, whatever happens.
    """
    held: dict[Prompt, tuple[CachedPrefix, object]] = {}

    def hold(prompt: Prompt) -> CachedPrefix:
        prefix = rank.match(_filled(rank, prompt))
        lock = rank.lock(prefix)
        if prompt in held:
            rank.unlock(held[prompt][1])
        held[prompt] = (prefix, lock)
        return prefix

    try:
        wanted = [prompt for prompt in prompts if prompt]
        missing = [prompt for prompt in wanted if hold(prompt).length < len(prompt)]
        computed = 0
        if missing:
            computed = _compute(rank, [(prompt, held[prompt][0]) for prompt in missing])
            for prompt in missing:
                prefix = hold(prompt)
                assert prefix.length >= len(prompt), "an inserted prompt must be found"
        found = {prompt: prefix for prompt, (prefix, _) in held.items()}
        slots = {p: rank.cached_kv_slots(prefix)[: len(p)] for p, prefix in found.items()}
        yield CachedPrefixes(found, slots, computed=computed, forwards=int(bool(missing)))
    finally:
        for _, lock in held.values():
            rank.unlock(lock)


@torch.inference_mode()
def _compute(rank: Rank, missing: Sequence[tuple[Prompt, CachedPrefix]]) -> int:
    """Run the missing ends of prompts on the base model and insert them; returns their tokens."""
    requests = []
    for i, (prompt, prefix) in enumerate(missing):
        request = scoring_request(f"mezo-prompt-{i}", prompt, None)
        ERA.use_prefix(request, prefix)
        requests.append(request)
    batch = rank.allocate(requests)
    try:
        logprobs.run(rank, batch)
    except BaseException:
        rank.release(batch)
        raise
    for request, (prompt, prefix) in zip(requests, missing, strict=True):
        # Another prompt of this batch may have brought a common beginning: `insert` sees to it.
        slots = rank.kv_slots(request, len(prompt))
        key = _filled(rank, prompt)
        if len(key) > len(prompt):
            rest = torch.arange(1, len(key) - len(prompt) + 1, device=slots.device)
            slots = torch.cat((slots, slots[-1] + rest))
        rank.insert(key, slots, prefix.length)
        rank.free_req_slot(request)
    return int(batch.extend_num_tokens)


def _filled(rank: Rank, prompt: Prompt) -> Prompt:
    """The prompt's key in the cache, whole pages long."""
    return (*prompt, *[_FILLER] * (-len(prompt) % rank.page_size))


def own_last_pages(
    rank: Rank, prefixes: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Copy the last page of a prefix that ends in the middle of it, once for each sequence.

    Args:
        rank: this rank.
        prefixes: of each sequence the KV slots of its prefix, which other sequences have, too.

    Returns:
        KV slots of each sequence's prefix; the last page, if it is not full, is the sequence's own.
        And the slots of these pages: SGLang puts the sequences' next tokens into them, and they go
        back with these, unless the batch comes to nothing before that.
    """
    slots = list(prefixes)
    cut = [i for i, prefix in enumerate(slots) if len(prefix) % rank.page_size]
    if not cut:
        return slots, torch.empty(0, dtype=torch.int64)
    to, source = [], []
    pages = rank.alloc_pages(len(cut))
    for i, own in zip(cut, pages, strict=True):
        size = len(slots[i]) % rank.page_size
        source.append(slots[i][-size:])
        to.append(own[:size])
        slots[i] = torch.cat((slots[i][:-size], own[:size]))
    rank.copy_kv(torch.cat(to), torch.cat(source))
    return slots, pages.reshape(-1)


@contextmanager
@torch.inference_mode()
def temporary(
    rank: Rank, wanted: Sequence[AdapterPrompt]
) -> Iterator[tuple[dict[AdapterPrompt, torch.Tensor], int]]:
    """Run prompts under adapters and keep their KV while a batch uses it, out of the cache.

    Args:
        rank: this rank.
        wanted: (adapter's uid or None, prompt) pairs without duplicates.

    Yields:
        ({pair: KV slots of the prompt}, tokens computed). Everything is given back afterwards.
    """
    if not wanted:
        yield {}, 0
        return
    requests = [
        scoring_request(f"mezo-temporary-{i}", prompt, uid)
        for i, (uid, prompt) in enumerate(wanted)
    ]
    batch = rank.allocate(requests)
    try:
        logprobs.run(rank, batch)
        slots = {
            pair: rank.kv_slots(request, len(pair[1]))
            for pair, request in zip(wanted, requests, strict=True)
        }
        yield slots, int(batch.extend_num_tokens)
    finally:
        rank.release(batch)
