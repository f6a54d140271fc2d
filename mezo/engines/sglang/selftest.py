"""The part of a run's self-test that is SGLang's: its pool, its memory, its cache's keys.

Runs in every scheduler process, between batches, with the run's own slots. Nothing enters the
engine's radix cache: keys are looked up in a tree of the same kind that is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mezo.core.messages import Check
from mezo.core.rows import THETA, Rows
from mezo.core.step import ScoreFn
from mezo.engines.selftest import digest, engine_checks
from mezo.engines.sglang import compat
from mezo.engines.sglang.compat import Rank

if TYPE_CHECKING:
    from mezo.engines.sglang.trained import TrainedAdapter


def checks(
    rank: Rank, adapter: TrainedAdapter, rows: Rows, invocation: Sequence[int], score: ScoreFn
) -> list[Check]:
    """Run all checks on this rank.

    Args:
        rank: this rank.
        adapter: the run's adapter.
        rows: the rows to score, without prefixes.
        invocation: the run's invocation tokens where it is an activated adapter, else none.
        score: scores rows under slots, the same numbers on every rank.
    """
    memory = rank.free_memory()
    others = _other_slots(rank, adapter)
    found = engine_checks(adapter.state, score, rows)
    found.append(_same("other adapters", others, _other_slots(rank, adapter)))
    found.append(_named(rank, adapter))
    if adapter.is_served:
        found.append(
            _activated_key(adapter, rows.tokens[0], invocation)
            if invocation
            else _stale_key(rank, adapter, rows.tokens[0])
        )
    found.append(_same_memory(memory, rank.free_memory()))
    return found


def merged(ranks: Sequence[Sequence[Check]]) -> tuple[Check, ...]:
    """One list of the checks of all ranks: of each the first that failed, else rank 0's."""
    together = []
    for same in zip(*ranks, strict=True):
        failed = [c for c in same if not c.is_ok]
        together.append((failed or list(same))[0])
    return tuple(together)


def _same_memory(before: dict[str, int], after: dict[str, int]) -> Check:
    """Whether memory and locks are as they were; forwards may evict what others have left."""
    evicted = max(before["evictable_tokens"] - after["evictable_tokens"], 0)
    kv, kept = before["kv_tokens"] + evicted, before["evictable_tokens"] - evicted
    return _same("memory and locks", {**before, "kv_tokens": kv, "evictable_tokens": kept}, after)


def _other_slots(rank: Rank, adapter: TrainedAdapter) -> dict[str, int]:
    """A digest of each adapter in the pool that is not the run's, computed on the device."""
    own, names = set(adapter.uids.values()), rank.lora_names
    return {
        names.get(uid, uid): digest(rank.slot_tensors(slot))
        for uid, slot in rank.lora_pool.uid_to_buffer_id.items()
        if uid is not None and uid not in own
    }


def _same(name: str, expected: dict[str, int], found: dict[str, int]) -> Check:
    """Whether numbers are as they were before the checks."""
    changed = {k: (expected.get(k), found.get(k)) for k in {*expected, *found}}
    changed = {k: pair for k, pair in changed.items() if pair[0] != pair[1]}
    if changed:
        numbers = ", ".join(f"{k}: {a} before, {b} after" for k, (a, b) in sorted(changed.items()))
        return Check(name, False, f"nothing may change, got {numbers}")
    return Check(name, True, f"{len(expected)} unchanged")


def _named(rank: Rank, adapter: TrainedAdapter) -> Check:
    """Whether each slot's id is loaded under the name that requests and eviction know it by."""
    refs, name = rank.lora_manager.lora_refs, adapter.config.name
    adapter_slots = rank.lora_pool.uid_to_buffer_id
    for slot, uid in adapter.uids.items():
        expected = name if slot == THETA else f"{name}/{slot}"
        ref = refs.get(uid)
        where = adapter_slots.get(uid)
        if ref is None or ref.lora_name != expected or not ref.pinned or where is None:
            found = None if ref is None else (ref.lora_name, ref.pinned)
            return Check(
                "slots are pinned",
                False,
                f"slot {slot} must be loaded and pinned as {expected!r}, got {found} in place "
                f"{where}",
            )
    places = [adapter_slots[uid] for uid in adapter.uids.values()]
    is_ok = len(set(places)) == len(places)
    return Check("slots are pinned", is_ok, f"{len(places)} adapters in places {places}")


def _stale_key(rank: Rank, adapter: TrainedAdapter, tokens: Sequence[int]) -> Check:
    """Whether KV of one version of theta is found by requests of that version only.

    Requests are made as SGLang makes them and looked up as it looks them up.
    """
    name, state, uid = "no stale KV", adapter.state, adapter.uids[THETA]
    page = rank.page_size
    long = (list(tokens) * page)[: max(page, 2)]
    tree, version = compat.scratch_tree(page), state.version
    compat.keep(tree, compat.served_request("mezo-selftest-0", long, uid), long)
    again, waiting, base = (
        compat.served_request(f"mezo-selftest-{i}", [*long, 1], lora_id)
        for i, lora_id in ((1, uid), (2, uid), (3, None))
    )
    same = compat.cached_tokens(again, tree)
    try:
        state.version += 1
        after = compat.served_request("mezo-selftest-4", [*long, 1], uid)
        stale = {
            "a request made after an update": compat.cached_tokens(after, tree),
            "a request that waited while theta was updated": compat.cached_tokens(waiting, tree),
            "a request for the base model": compat.cached_tokens(base, tree),
        }
    finally:
        state.version = version
    if same != len(long):
        return Check(
            name,
            False,
            f"a request must find the {len(long)} cached tokens of its own version, got {same}",
        )
    for what, length in stale.items():
        if length:
            return Check(
                name,
                False,
                f"{what} must find no token of the KV that version {version} left in the cache, "
                f"got {length} of {len(long)} (key {after.extra_key!r})",
            )
    return Check(name, True, "KV of one version is not found by requests of the next")


def _activated_key(
    adapter: TrainedAdapter, tokens: Sequence[int], invocation: Sequence[int]
) -> Check:
    """Whether a request for an activated adapter matches, and leaves, KV of the base model only."""
    before = [t for t in tokens if t not in invocation]
    prompt = [*before, *invocation, *before]
    request = compat.served_request("mezo-selftest-0", prompt, adapter.uids[THETA])
    limit = compat.match_limit(request, len(prompt))
    is_kept_out = bool(getattr(request, "skip_radix_cache_insert", False))
    is_ok = limit == len(before) and is_kept_out and request.extra_key is None
    return Check(
        "no stale KV",
        is_ok,
        f"a request may match {len(before)} tokens under the base model's key and leave none, got "
        f"{limit}, key {request.extra_key!r}, kept out of the cache: {is_kept_out}",
    )
