"""Scores rows under adapter slots: every sequence and sign in one extend batch, scalars out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mezo.config import MeZOConfig
from mezo.core.rows import BASE, THETA, Rows, Scores
from mezo.engines.sequences import TokenSequence, sequences_of
from mezo.engines.sglang.batch import attention, logprobs
from mezo.engines.sglang.batch.prefix import (
    AdapterPrompt,
    CachedPrefixes,
    cached,
    own_last_pages,
    temporary,
)
from mezo.engines.sglang.compat import Rank, scoring_request
from mezo.engines.sglang.eras import ERA
from mezo.engines.sglang.sizing import check_one_row

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# A prefix that runs under the sequence's own adapter, once for all that begin with it.
_OWN = "own"


@dataclass(frozen=True)
class _Copy:
    """A sequence under one adapter: its slot's name and the adapter's uid (None: base model)."""

    slot: str
    uid: str | None
    sequence: TokenSequence


def score_rows(
    rank: Rank, rows: Rows, adapters: dict[str, str | None], *, theta: str | None
) -> Scores:
    """Score every row under every adapter, all of them in one batch where they fit.

    Prefixes of the base model are read from the radix cache, or computed once and left there; all
    rows and adapters use the same KV. Prefixes under theta, and prompts that several rows have in
    common, are temporary: computed first, for the rows of this call only. A batch that exceeds the
    engine's token budget is cut into chunks of whole sequences; all adapters' copies of one stay
    in one batch, so that both signs always see the same batch.

    Args:
        rank: this rank.
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
    for first, last in _chunks(rank, sequences, len(adapters)):
        chunk = sequences[first:last]
        prompts = [s.prefix for s in chunk if s.prefix_adapter == BASE and s.prefix_len]
        pairs = [
            _temporary_prefix(s, uid, theta)
            for uid in adapters.values()
            for s in chunk
            if s.prefix_adapter != BASE and s.prefix_len
        ]
        with (
            cached(rank, list(dict.fromkeys(prompts))) as prefixes,
            temporary(rank, list(dict.fromkeys(pairs))) as (kv_slots, computed),
        ):
            batch = _Batch(rank, chunk, adapters, prefixes, kv_slots, theta)
            own, found = batch.score(sums)
        tokens += own + prefixes.computed + computed
        prompt_tokens += prefixes.computed + computed
        reused += found
        forwards += 1 + prefixes.forwards + bool(kv_slots)
    return Scores(sums, tokens, forwards, prompt_tokens, reused)


def check_budget(rank: Rank, config: MeZOConfig) -> None:
    """Raise ValueError where an engine of the user's own is too small for any step of a run."""
    tokens, requests = rank.largest_budget
    check_one_row("attach", config, requests=requests, tokens=tokens)


def is_busy(rank: Rank, rows: Rows, copies: int) -> bool:
    """Whether requests that are running leave no room for one row with all its copies."""
    max_tokens, max_requests = rank.budget
    page = rank.page_size
    longest = -(-max(map(len, rows.tokens)) // page) * page
    return max_requests < copies or max_tokens < copies * longest


def _sequences(rows: Rows) -> list[TokenSequence]:
    """The distinct sequences to run; those that begin with one prompt share it in every mode."""
    sequences = sequences_of(rows)
    sharing = Counter(s.prompt for s in sequences)
    for i, s in enumerate(sequences):
        if s.prefix_len == 0 and sharing[s.prompt] > 1:
            # The prompt's last token runs in each: its logits score the first completion token.
            sequences[i] = replace(s, prefix_len=s.prompt_len - 1, prefix_adapter=_OWN)
    return sequences


def _temporary_prefix(sequence: TokenSequence, uid: str | None, theta: str | None) -> AdapterPrompt:
    """A sequence's prefix outside of the cache, for the copy that runs under ``uid``."""
    return (uid if sequence.prefix_adapter == _OWN else theta, sequence.prefix)


def _chunks(
    rank: Rank, sequences: Sequence[TokenSequence], copies: int
) -> Iterator[tuple[int, int]]:
    """Cut sequences into runs that fit into one batch: their prefixes once, the rest per copy."""
    max_tokens, max_requests = rank.budget
    page = rank.page_size
    first = tokens = requests = 0
    prefixes: set[tuple[str, tuple[int, ...]]] = set()
    for i, sequence in enumerate(sequences):
        key = (sequence.prefix_adapter, sequence.prefix)
        # A copy's own pages, with the one that it continues.
        own = copies * page * (-(-len(sequence.tokens) // page) - sequence.prefix_len // page)
        # A temporary prefix keeps its request while the sequences run.
        requests_of = {BASE: 0, THETA: 1, _OWN: copies}
        runs = requests_of[sequence.prefix_adapter] if sequence.prefix_len else 0
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

    rank: Rank
    sequences: Sequence[TokenSequence]
    adapters: dict[str, str | None]
    prefixes: CachedPrefixes
    temporary: dict[AdapterPrompt, torch.Tensor]  # their KV slots
    theta: str | None

    @torch.inference_mode()
    def score(self, sums: dict[str, list[float]]) -> tuple[int, int]:
        """Score into ``sums``; returns the tokens computed and the prefix tokens reused."""
        copies = self._copies()
        members = [self._member(copy) for copy in copies]
        requests, pages = self._requests(copies, members)
        try:
            batch = self.rank.allocate(requests)
        except BaseException:
            self.rank.free_kv_slots(pages)
            raise
        try:
            wanted, sums_of = _wanted(copies)
            grouping = attention.group(self.rank, members)
            values = logprobs.run(self.rank, batch, wanted, grouping)
            for (slot, row), value in zip(sums_of, values, strict=True):
                sums[slot][row] += value
            return int(batch.extend_num_tokens), int(sum(batch.prefix_lens))
        finally:
            self.rank.release(batch)

    def _copies(self) -> list[_Copy]:
        """Every sequence under every adapter, in the order of the batch."""
        adapters = self.adapters.items()
        if self.rank.device == "cpu":
            # Adapter by adapter: neighbours under one adapter share their LoRA products.
            return [_Copy(slot, uid, s) for slot, uid in adapters for s in self.sequences]
        # Sequence by sequence: those that share a prefix are neighbours.
        return [_Copy(slot, uid, s) for s in self.sequences for slot, uid in adapters]

    def _member(self, copy: _Copy) -> attention.Member:
        """How many tokens a copy runs, and where its prefix lies."""
        sequence = copy.sequence
        size = len(sequence.tokens) - sequence.prefix_len
        if not sequence.prefix_len:
            return attention.Member(size, None, None)
        if sequence.prefix_adapter == BASE:
            kv_slots = self.prefixes.kv_slots[sequence.prefix]
            return attention.Member(size, (BASE, sequence.prefix), kv_slots)
        prefix = _temporary_prefix(sequence, copy.uid, self.theta)
        return attention.Member(size, prefix, self.temporary[prefix])

    def _requests(
        self, copies: Sequence[_Copy], members: Sequence[attention.Member]
    ) -> tuple[list[Req], torch.Tensor]:
        """A request for each copy, with the KV of its prefix; and the pages allocated for it."""
        requests, named = [], []
        for i, (copy, member) in enumerate(zip(copies, members, strict=True)):
            sequence = copy.sequence
            request = scoring_request(f"mezo-{i}", sequence.tokens, copy.uid)
            requests.append(request)
            if member.kv_slots is None:
                continue
            is_cached = sequence.prefix_adapter == BASE
            prefix = self.prefixes.found.get(sequence.prefix) if is_cached else None
            if prefix is not None and prefix.length == sequence.prefix_len:
                ERA.use_prefix(request, prefix)
            else:
                named.append((request, member.kv_slots))
        owned, pages = own_last_pages(self.rank, [kv_slots for _, kv_slots in named])
        for (request, _), kv_slots in zip(named, owned, strict=True):
            self.rank.use_kv_slots(request, kv_slots)
        return requests, pages


def _wanted(copies: Sequence[_Copy]) -> tuple[logprobs.Wanted, list[tuple[str, int]]]:
    """What to score of the copies' hidden states, and the (slot, row) that each value adds to."""
    wanted, sums_of = logprobs.Wanted(), []
    start = 0
    for copy in copies:
        # Hidden states of the prefix are not in the batch.
        begin = start - copy.sequence.prefix_len
        start = begin + len(copy.sequence.tokens)
        for scored in copy.sequence.scored_tokens:
            wanted.add(begin + scored.position, scored.token, scored.is_normalised)
            sums_of.append((copy.slot, scored.row))
    return wanted, sums_of
