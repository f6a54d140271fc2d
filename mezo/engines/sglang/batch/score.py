"""Scores rows under adapter slots: every row and sign in one extend batch, scalars out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mezo.config import MezoConfig
from mezo.core.rows import BASE, THETA, Rows, Scores
from mezo.engines.sequences import Reading, sequences_of
from mezo.engines.sglang import compat
from mezo.engines.sglang.batch import attention, logprobs
from mezo.engines.sglang.batch.prefix import Owned, Prefixes, own_last_pages, private, shared
from mezo.engines.sglang.sizing import check_one_row

# A prefix that runs under the row's own adapter, once for all rows that begin with it.
_OWN = "own"


@dataclass(frozen=True)
class _Sequence:
    """Tokens to run once for each adapter, with a prefix whose KV is shared."""

    tokens: tuple[int, ...]
    prefix_len: int  # leading tokens whose KV is shared
    owner: str  # what they run under: BASE (kept in the radix cache), THETA or _OWN
    readings: Sequence[Reading]

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.tokens[: self.prefix_len]


def score_rows(
    scheduler: Any, rows: Rows, adapters: dict[str, str | None], *, theta: str | None
) -> Scores:
    """Score every row under every adapter, all of them in one batch where they fit.

    Prefixes of the base model are taken from the radix cache, or computed once and left there; all
    rows and adapters share their KV. Prefixes under theta, and prompts that several rows have in
    common, are computed first and shared by the rows of this call alone. A batch that exceeds the
    engine's token budget is cut into chunks of whole sequences; all adapters' copies of one stay
    in one batch, so that both signs always see the same batch.

    Args:
        scheduler: this rank's scheduler.
        rows: R token rows.
        adapters: {slot name: lora uid, or None for the base model}.
        theta: uid of the adapter that detached prefixes run under; None where there are none.

    Returns:
        The sums of the completion tokens' log-likelihoods (or logits, see `Rows`), and what was
        computed.

    Raises:
        ValueError: a row that does not fit once for every adapter.

    Numerics: see `logprobs.run`; a row's sum in float64. KV and request slots and
        locks go back afterwards, also when a forward fails; no adapter's KV enters the cache.
    """
    sums = {slot: [0.0] * len(rows) for slot in adapters}
    sequences = _sequences(rows)
    tokens = forwards = prompt_tokens = reused = 0
    for first, last in _chunks(scheduler, sequences, len(adapters)):
        chunk = sequences[first:last]
        cached = [s.prefix for s in chunk if s.owner == BASE and s.prefix_len]
        owned = [
            (_owner(s, uid, theta), s.prefix)
            for uid in adapters.values()
            for s in chunk
            if s.owner != BASE and s.prefix_len
        ]
        with (
            shared(scheduler, list(dict.fromkeys(cached))) as prefixes,
            private(scheduler, list(dict.fromkeys(owned))) as (slots, computed),
        ):
            batch = _Batch(scheduler, chunk, adapters, prefixes, slots, theta)
            own, taken = batch.score(sums)
        tokens += own + prefixes.computed + computed
        prompt_tokens += prefixes.computed + computed
        reused += taken
        forwards += 1 + prefixes.forwards + bool(slots)
    return Scores(sums, tokens, forwards, prompt_tokens, reused)


def budget(scheduler: Any) -> tuple[int, int]:
    """Tokens and sequences that one scoring batch may have now."""
    free = compat.free_memory(scheduler)
    limit = int(scheduler.server_args.max_prefill_tokens)
    return min(free["kv_tokens"] + free["evictable_tokens"], limit), free["request_slots"]


def check_budget(scheduler: Any, config: MezoConfig) -> None:
    """Raise ValueError where an engine of the user's own is too small for any step of a run."""
    limits = (scheduler.max_total_num_tokens, scheduler.server_args.max_prefill_tokens)
    requests = int(scheduler.req_to_token_pool.size)
    check_one_row("attach", config, requests=requests, tokens=int(min(limits)))


def is_busy(scheduler: Any, rows: Rows, copies: int) -> bool:
    """Whether requests that are running leave no room for one row with all its copies."""
    max_tokens, max_requests = budget(scheduler)
    page = int(scheduler.page_size)
    longest = -(-max(map(len, rows.tokens)) // page) * page
    return max_requests < copies or max_tokens < copies * longest


def _owner(sequence: _Sequence, uid: str | None, theta: str | None) -> str | None:
    """The uid that a prefix outside of the cache runs under."""
    return uid if sequence.owner == _OWN else theta


def _sequences(rows: Rows) -> list[_Sequence]:
    """The distinct sequences to run; those that begin with one prompt share it in every mode."""
    distinct = sequences_of(rows)
    sharing = Counter(s.prompt for s in distinct)
    sequences = []
    for s in distinct:
        prefix_len, owner = s.prefix_len, rows.prefix_adapter
        if prefix_len == 0 and sharing[s.prompt] > 1:
            # The prompt's last token runs in each: the first completion token is read off it.
            prefix_len, owner = s.prompt_len - 1, _OWN
        sequences.append(_Sequence(s.tokens, prefix_len, owner, s.readings))
    return sequences


def _chunks(
    scheduler: Any, sequences: Sequence[_Sequence], copies: int
) -> Iterator[tuple[int, int]]:
    """Cut sequences into runs that fit into one batch: their prefixes once, the rest per copy."""
    max_tokens, max_requests = budget(scheduler)
    page = int(scheduler.page_size)
    first = tokens = requests = 0
    prefixes: set[tuple[str, tuple[int, ...]]] = set()
    for i, sequence in enumerate(sequences):
        key = (sequence.owner, sequence.prefix)
        # A row's own pages, with the one that it continues.
        own = copies * page * (-(-len(sequence.tokens) // page) - sequence.prefix_len // page)
        # A prefix outside of the cache keeps its request while the rows run.
        runs = {BASE: 0, THETA: 1, _OWN: copies}[sequence.owner] if sequence.prefix_len else 0
        prefix = -(-sequence.prefix_len // page) * page * max(runs, 1)
        if own + prefix > max_tokens or copies + runs > max_requests:
            raise ValueError(
                f"step: {copies} copies of a row of {len(sequence.tokens)} tokens "
                f"({sequence.prefix_len} of them shared) must fit into the engine, got "
                f"{max_tokens} free KV tokens and {max_requests} free request slots; wait for the "
                "requests that are running, shorten the row or start the engine with larger "
                "max_total_tokens and max_running_requests."
            )
        is_new = key not in prefixes
        is_full = (
            tokens + own + is_new * prefix > max_tokens
            or requests + copies + is_new * runs > max_requests
        )
        if i > first and is_full:
            yield first, i
            first, tokens, requests, is_new = i, 0, 0, True
            prefixes.clear()
        prefixes.add(key)
        tokens += own + is_new * prefix
        requests += copies + is_new * runs
    yield first, len(sequences)


@dataclass
class _Batch:
    """Sequences under every adapter, in one extend batch."""

    scheduler: Any
    sequences: Sequence[_Sequence]
    adapters: dict[str, str | None]
    prefixes: Prefixes
    slots: dict[Owned, Any]
    theta: str | None

    @torch.inference_mode()
    def score(self, sums: dict[str, list[float]]) -> tuple[int, int]:
        """Score into ``sums``; returns the tokens computed and the prefix tokens reused."""
        copies = self._copies()
        rows = [self._row(uid, sequence) for _, uid, sequence in copies]
        requests, pages = self._requests([(uid, s) for _, uid, s in copies], rows)
        try:
            batch = compat.allocate(self.scheduler, requests)
        except BaseException:
            compat.free_slots(self.scheduler, pages)
            raise
        try:
            wanted, readers = _wanted([(slot, sequence) for slot, _, sequence in copies])
            grouping = attention.group(self.scheduler, rows)
            values = logprobs.run(self.scheduler, batch, wanted, grouping)
            for (slot, row), value in zip(readers, values, strict=True):
                sums[slot][row] += value
            return int(batch.extend_num_tokens), int(sum(batch.prefix_lens))
        finally:
            compat.release(self.scheduler, batch)

    def _copies(self) -> list[tuple[str, str | None, _Sequence]]:
        """Every sequence under every adapter, in the order of the batch."""
        adapters = self.adapters.items()
        if compat.model_runner(self.scheduler).device == "cpu":
            # Adapter by adapter: neighbours under one adapter share their LoRA products.
            return [(slot, uid, sequence) for slot, uid in adapters for sequence in self.sequences]
        # Sequence by sequence: the rows that share a prefix are neighbours.
        return [(slot, uid, sequence) for sequence in self.sequences for slot, uid in adapters]

    def _row(self, uid: str | None, sequence: _Sequence) -> attention.Row:
        """How many tokens a copy runs, and where its prefix lies."""
        size = len(sequence.tokens) - sequence.prefix_len
        if not sequence.prefix_len:
            return attention.Row(size, None, None)
        if sequence.owner == BASE:
            slots = self.prefixes.slots[sequence.prefix]
            return attention.Row(size, (BASE, sequence.prefix), slots)
        owned = (_owner(sequence, uid, self.theta), sequence.prefix)
        return attention.Row(size, owned, self.slots[owned])

    def _requests(
        self, copies: Sequence[tuple[str | None, _Sequence]], rows: Sequence[attention.Row]
    ) -> tuple[list[Any], torch.Tensor]:
        """A request for each copy, with the KV of its prefix; and the pages that took."""
        requests, named = [], []
        for i, ((uid, sequence), row) in enumerate(zip(copies, rows, strict=True)):
            request = compat.scoring_request(f"mezo-{i}", sequence.tokens, uid)
            requests.append(request)
            if row.slots is None:
                continue
            hit = self.prefixes.hits.get(sequence.prefix) if sequence.owner == BASE else None
            if hit is not None and hit.length == sequence.prefix_len:
                compat.set_prefix(request, hit)
            else:
                named.append((request, row.slots))
        owned, pages = own_last_pages(self.scheduler, [slots for _, slots in named])
        for (request, _), slots in zip(named, owned, strict=True):
            compat.set_slots(self.scheduler, request, slots)
        return requests, pages


def _wanted(
    copies: Sequence[tuple[str, _Sequence]],
) -> tuple[logprobs.Wanted, list[tuple[str, int]]]:
    """What to read off the copies' hidden states, and the (slot, row) that each value adds to."""
    wanted, readers = logprobs.Wanted(), []
    start = 0
    for slot, sequence in copies:
        begin = start - sequence.prefix_len  # hidden states of the prefix are not in the batch
        start = begin + len(sequence.tokens)
        for reading in sequence.readings:
            wanted.add(begin + reading.position, reading.token, reading.is_normalised)
            readers.append((slot, reading.row))
    return wanted, readers
