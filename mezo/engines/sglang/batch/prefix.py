"""Prompts shared through SGLang's radix cache: computed once on the base model, locked for a batch.

An activated adapter acts from the invocation on, so a prompt's KV is the base model's and serves
every row, sign, direction, option, step and epoch - and base-model requests, since it lies in the
cache under their key. Under memory pressure it is evicted like theirs, and computed again.

With pages of several tokens the cache keeps whole pages only. A prompt's last page is then kept
under a key that is filled up with `_FILLER`, which no request can have, and each row that continues
the prompt gets a copy of that page's tokens in a page of its own: rows write behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mezo.engines.sglang import compat
from mezo.engines.sglang.batch import logprobs

Prompt = tuple[int, ...]
_FILLER = -1
Owned = tuple[str | None, Prompt]


@dataclass
class Prefixes:
    """The prompts of a batch, all of them in the cache and locked.

    Args:
        hits: where each prompt lies.
        slots: KV slots of each prompt.
        computed: prompt tokens that had to be computed.
        forwards: forward batches that took.
    """

    hits: dict[Prompt, compat.Hit]
    slots: dict[Prompt, torch.Tensor]
    computed: int = 0
    forwards: int = 0


def check_cache(scheduler: Any) -> None:
    """Raise unless the engine has a cache that can keep prompts.

    Raises:
        NotImplementedError: the radix cache is off.
    """
    if scheduler.server_args.disable_radix_cache:
        raise NotImplementedError(
            "attach: prefix 'activated' keeps prompts in the radix cache, got "
            "disable_radix_cache=True; start the engine without it."
        )


@contextmanager
def shared(scheduler: Any, prompts: Sequence[Prompt]) -> Iterator[Prefixes]:
    """Hold prompts in the cache while a batch uses them, computing those that are not there.

    Args:
        scheduler: this rank's scheduler.
        prompts: prompts without duplicates; empty ones are passed over.

    Yields:
        Where the prompts lie. All locks are given back afterwards, whatever happens.
    """
    held: dict[Prompt, tuple[compat.Hit, Any]] = {}

    def hold(prompt: Prompt) -> compat.Hit:
        hit = compat.match(scheduler.tree_cache, _filled(scheduler, prompt))
        lock = compat.lock(scheduler.tree_cache, hit.node)
        if prompt in held:
            compat.unlock(scheduler.tree_cache, held[prompt][1])
        held[prompt] = (hit, lock)
        return hit

    try:
        wanted = [prompt for prompt in prompts if prompt]
        missing = [prompt for prompt in wanted if hold(prompt).length < len(prompt)]
        computed = 0
        if missing:
            computed = _compute(scheduler, [(prompt, held[prompt][0]) for prompt in missing])
            for prompt in missing:
                hit = hold(prompt)
                assert hit.length >= len(prompt), "an inserted prompt must be found"
        hits = {prompt: hit for prompt, (hit, _) in held.items()}
        slots = {p: compat.slots_of(scheduler.tree_cache, hit)[: len(p)] for p, hit in hits.items()}
        yield Prefixes(hits, slots, computed=computed, forwards=int(bool(missing)))
    finally:
        for _, lock in held.values():
            compat.unlock(scheduler.tree_cache, lock)


@torch.inference_mode()
def _compute(scheduler: Any, missing: Sequence[tuple[Prompt, compat.Hit]]) -> int:
    """Run the missing ends of prompts on the base model and insert them; returns their tokens."""
    requests = []
    for i, (prompt, hit) in enumerate(missing):
        request = compat.scoring_request(f"mezo-prompt-{i}", prompt, None)
        compat.set_prefix(request, hit)
        requests.append(request)
    batch = compat.allocate(scheduler, requests)
    try:
        logprobs.run(scheduler, batch)
    except BaseException:
        compat.release(scheduler, batch)
        raise
    for request, (prompt, hit) in zip(requests, missing, strict=True):
        # Another prompt of this batch may have brought a common beginning: `insert` sees to it.
        slots = compat.kv_slots(scheduler, request, len(prompt))
        key = _filled(scheduler, prompt)
        if len(key) > len(prompt):
            rest = torch.arange(1, len(key) - len(prompt) + 1, device=slots.device)
            slots = torch.cat((slots, slots[-1] + rest))
        compat.insert(scheduler, key, slots, hit.length)
        compat.free_row(scheduler, request)
    return int(batch.extend_num_tokens)


def _filled(scheduler: Any, prompt: Prompt) -> Prompt:
    """The prompt's key in the cache, whole pages long."""
    return (*prompt, *[_FILLER] * (-len(prompt) % int(scheduler.page_size)))


def own_last_pages(
    scheduler: Any, prefixes: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Give each row that continues a prefix in the middle of a page a copy of that page's tokens.

    Args:
        scheduler: this rank's scheduler.
        prefixes: of each row the KV slots of its prefix, shared with other rows.

    Returns:
        KV slots of each row's prefix; the last page, if it is not full, is the row's own. And the
        slots of these pages: SGLang puts the rows' next tokens into them, and they go back with
        these, unless the batch comes to nothing before that.
    """
    page = int(scheduler.page_size)
    slots = list(prefixes)
    cut = [i for i, shared in enumerate(slots) if len(shared) % page]
    if not cut:
        return slots, torch.empty(0, dtype=torch.int64)
    to, source = [], []
    pages = compat.alloc_pages(scheduler, len(cut))
    for i, own in zip(cut, pages, strict=True):
        size = len(slots[i]) % page
        source.append(slots[i][-size:])
        to.append(own[:size])
        slots[i] = torch.cat((slots[i][:-size], own[:size]))
    compat.copy_kv(scheduler, torch.cat(to), torch.cat(source))
    return slots, pages.reshape(-1)


@contextmanager
@torch.inference_mode()
def private(scheduler: Any, wanted: Sequence[Owned]) -> Iterator[tuple[dict[Owned, Any], int]]:
    """Run prompts under adapters and keep their KV while a batch uses it, out of the cache.

    Args:
        scheduler: this rank's scheduler.
        wanted: (adapter's uid or None, prompt) pairs without duplicates.

    Yields:
        ({pair: KV slots of the prompt}, tokens computed). Everything is given back afterwards.
    """
    if not wanted:
        yield {}, 0
        return
    requests = [
        compat.scoring_request(f"mezo-private-{i}", prompt, uid)
        for i, (uid, prompt) in enumerate(wanted)
    ]
    batch = compat.allocate(scheduler, requests)
    try:
        logprobs.run(scheduler, batch)
        slots = {
            pair: compat.kv_slots(scheduler, request, len(pair[1]))
            for pair, request in zip(wanted, requests, strict=True)
        }
        yield slots, int(batch.extend_num_tokens)
    finally:
        compat.release(scheduler, batch)
