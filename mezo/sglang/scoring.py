"""Scores rows under adapter slots: every row and sign in one extend batch, scalars out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mezo.core import Scores
from mezo.data import Rows
from mezo.sglang import compat
from mezo.sglang.prefix import Prefixes, shared


@dataclass
class _Sequence:
    """Tokens to run once for each adapter, and the rows that are read off them.

    Rows that are one prompt with different single tokens behind it are one sequence, the prompt:
    the logits behind its last token hold them all. Any other row is a sequence of its own.
    """

    tokens: tuple[int, ...]
    prefix_len: int  # leading tokens whose KV is the base model's
    first: int  # log-likelihoods are wanted of tokens[first + 1:]
    row: int | None = None
    next_tokens: list[tuple[int, int]] = field(default_factory=list)  # (row, token)

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.tokens[: self.prefix_len]


def score_rows(scheduler: Any, rows: Rows, adapters: dict[str, str | None]) -> Scores:
    """Score every row under every adapter, all of them in one batch where they fit.

    Prefixes are taken from the radix cache, or computed once on the base model and left there;
    all rows and adapters share their KV. A batch that exceeds the engine's token budget is cut into
    chunks of whole sequences; all adapters' copies of one stay in one batch, so that both signs
    always see the same batch.

    Args:
        scheduler: this rank's scheduler.
        rows: R token rows.
        adapters: {slot name: lora uid, or None for the base model}.

    Returns:
        The sums of the completion tokens' log-likelihoods, and what was computed.

    Raises:
        ValueError: a row that does not fit once for every adapter.

    Numerics: log-softmax of the engine's logits in fp32; sums in float64. KV and request slots and
        locks go back afterwards, also when a forward fails; no adapter's KV enters the cache.
    """
    sums = {slot: [0.0] * len(rows) for slot in adapters}
    sequences = _sequences(rows)
    tokens = forwards = prompt_tokens = reused = 0
    for first, last in _chunks(scheduler, sequences, len(adapters)):
        chunk = sequences[first:last]
        prompts = list(dict.fromkeys(s.prefix for s in chunk))
        with shared(scheduler, prompts) as prefixes:
            computed, taken = _score_batch(scheduler, chunk, adapters, prefixes, sums)
        tokens += computed + prefixes.computed
        prompt_tokens += prefixes.computed
        reused += taken
        forwards += 1 + prefixes.forwards
    return Scores(sums, tokens, forwards, prompt_tokens, reused)


def budget(scheduler: Any) -> tuple[int, int]:
    """Tokens and sequences that one scoring batch may have now."""
    free = compat.free_memory(scheduler)
    limit = int(scheduler.server_args.max_prefill_tokens)
    return min(free["kv_tokens"] + free["evictable_tokens"], limit), free["request_slots"]


def _sequences(rows: Rows) -> list[_Sequence]:
    """The distinct sequences to run."""
    sequences: list[_Sequence] = []
    by_prompt: dict[tuple[tuple[int, ...], int], _Sequence] = {}
    for i, (row, prefix_len, prompt_len) in enumerate(
        zip(rows.tokens, rows.prefix_lens, rows.prompt_lens, strict=True)
    ):
        if len(row) - prompt_len > 1:
            sequences.append(_Sequence(tuple(row), prefix_len, prompt_len - 1, row=i))
            continue
        key = (tuple(row[:prompt_len]), prefix_len)
        if key not in by_prompt:
            by_prompt[key] = _Sequence(key[0], prefix_len, prompt_len)
            sequences.append(by_prompt[key])
        by_prompt[key].next_tokens.append((i, row[-1]))
    return sequences


def _chunks(
    scheduler: Any, sequences: Sequence[_Sequence], copies: int
) -> Iterator[tuple[int, int]]:
    """Cut sequences into runs that fit into one batch: their prefixes once, the rest per copy."""
    max_tokens, max_sequences = budget(scheduler)
    page = int(scheduler.page_size)
    first = tokens = 0
    prefixes: set[tuple[int, ...]] = set()
    for i, sequence in enumerate(sequences):
        own = copies * (-(-(len(sequence.tokens) - sequence.prefix_len) // page) * page)
        if own + sequence.prefix_len > max_tokens or copies > max_sequences:
            raise ValueError(
                f"step: {copies} copies of a row of {len(sequence.tokens)} tokens "
                f"({sequence.prefix_len} of them shared) must fit into the engine, got "
                f"{max_tokens} free KV tokens and {max_sequences} free request slots; shorten the "
                "row or start the engine with larger max_total_tokens and max_running_requests."
            )
        need = own + (0 if sequence.prefix in prefixes else sequence.prefix_len)
        is_full = tokens + need > max_tokens or (i - first + 1) * copies > max_sequences
        if i > first and is_full:
            yield first, i
            first, tokens = i, 0
            prefixes.clear()
            need = own + sequence.prefix_len
        prefixes.add(sequence.prefix)
        tokens += need
    yield first, len(sequences)


@torch.inference_mode()
def _score_batch(
    scheduler: Any,
    sequences: Sequence[_Sequence],
    adapters: dict[str, str | None],
    prefixes: Prefixes,
    sums: dict[str, list[float]],
) -> tuple[int, int]:
    """Score one batch into ``sums``; returns the tokens computed and those taken from the cache."""
    # Adapter by adapter: neighbours under one adapter share their LoRA matmuls.
    copies = [(slot, uid, sequence) for slot, uid in adapters.items() for sequence in sequences]
    requests = []
    for i, (slot, uid, sequence) in enumerate(copies):
        request = compat.scoring_request(f"mezo-{slot}-{i}", sequence.tokens, uid, sequence.first)
        if sequence.prefix_len:
            compat.set_prefix(request, prefixes.hits[sequence.prefix])
        requests.append(request)
    batch, forward_batch = compat.prepare_extend(scheduler, requests)
    try:
        output = compat.model_runner(scheduler).forward(forward_batch).logits_output
        _read(output, copies, sums)
        return int(batch.extend_num_tokens), int(sum(batch.prefix_lens))
    finally:
        compat.release(scheduler, batch)


def _read(
    output: Any, copies: Sequence[tuple[str, Any, _Sequence]], sums: dict[str, list[float]]
) -> None:
    """Read the rows' sums off the logits processor's output."""
    # Of a whole row: one value a scored token, then one that belongs to no token of it.
    lengths = [len(s.tokens) - s.first for _, _, s in copies]
    if any(lengths):
        pieces = output.input_token_logprobs.double().cpu().split(lengths)
        for (slot, _, sequence), piece in zip(copies, pieces, strict=True):
            if sequence.row is not None:
                sums[slot][sequence.row] = float(piece[:-1].sum())
    readers = [
        (i, slot, row, token)
        for i, (slot, _, sequence) in enumerate(copies)
        for row, token in sequence.next_tokens
    ]
    if readers:
        logprobs = output.next_token_logits.float().log_softmax(-1)
        picked = logprobs[[r[0] for r in readers], [r[3] for r in readers]].tolist()
        for (_, slot, row, _), value in zip(readers, picked, strict=True):
            sums[slot][row] = value
