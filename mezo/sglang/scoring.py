"""Scores rows under adapter slots: every row and sign in one extend batch, scalars out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mezo.core import Scores
from mezo.sglang import compat


@dataclass
class _Sequence:
    """Tokens to run once for each adapter, and the rows that are read off them.

    Rows that are one prompt with different single tokens behind it are one sequence, the prompt:
    the logits behind its last token hold them all. Any other row is a sequence of its own.
    """

    tokens: tuple[int, ...]
    first: int  # log-likelihoods are wanted of tokens[first + 1:]
    row: int | None = None
    next_tokens: list[tuple[int, int]] = field(default_factory=list)  # (row, token)


def score_rows(
    scheduler: Any,
    rows: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    adapters: dict[str, str | None],
) -> Scores:
    """Score every row under every adapter, all of them in one batch where they fit.

    A batch that exceeds the engine's token budget is cut into chunks of whole sequences; all
    adapters' copies of one stay in one batch, so that both signs always see the same batch.

    Args:
        scheduler: this rank's scheduler.
        rows: R token rows.
        prompt_lens: R numbers of unscored leading tokens.
        adapters: {slot name: lora uid, or None for the base model}.

    Returns:
        The sums of the completion tokens' log-likelihoods, and what was computed.

    Raises:
        ValueError: a row that does not fit once for every adapter.

    Numerics: log-softmax of the engine's logits in fp32; sums in float64. KV and request slots go
        back afterwards, also when the forward fails; nothing enters the radix cache.
    """
    sums = {slot: [0.0] * len(rows) for slot in adapters}
    sequences = _sequences(rows, prompt_lens)
    tokens = forwards = 0
    for first, last in _chunks(scheduler, sequences, len(adapters)):
        tokens += _score_batch(scheduler, sequences[first:last], adapters, sums)
        forwards += 1
    return Scores(sums, tokens=tokens, forwards=forwards)


def budget(scheduler: Any) -> tuple[int, int]:
    """Tokens and sequences that one scoring batch may have now."""
    free = compat.free_memory(scheduler)
    limit = int(scheduler.server_args.max_prefill_tokens)
    return min(free["kv_tokens"] + free["evictable_tokens"], limit), free["request_slots"]


def _sequences(rows: Sequence[Sequence[int]], prompt_lens: Sequence[int]) -> list[_Sequence]:
    """The distinct sequences to run."""
    sequences: list[_Sequence] = []
    by_prompt: dict[tuple[int, ...], _Sequence] = {}
    for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens, strict=True)):
        if len(row) - prompt_len > 1:
            sequences.append(_Sequence(tuple(row), prompt_len - 1, row=i))
            continue
        prompt = tuple(row[:prompt_len])
        if prompt not in by_prompt:
            by_prompt[prompt] = _Sequence(prompt, prompt_len)
            sequences.append(by_prompt[prompt])
        by_prompt[prompt].next_tokens.append((i, row[-1]))
    return sequences


def _chunks(
    scheduler: Any, sequences: Sequence[_Sequence], copies: int
) -> Iterator[tuple[int, int]]:
    """Cut sequences into runs whose copies fit into one batch."""
    max_tokens, max_sequences = budget(scheduler)
    page = int(scheduler.page_size)
    first = tokens = 0
    for i, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        need = copies * (-(-length // page) * page)
        if need > max_tokens or copies > max_sequences:
            raise ValueError(
                f"step: {copies} copies of a row of {length} tokens must fit into the engine, got "
                f"{max_tokens} free KV tokens and {max_sequences} free request slots; shorten the "
                "row or start the engine with larger max_total_tokens and max_running_requests."
            )
        is_full = tokens + need > max_tokens or (i - first + 1) * copies > max_sequences
        if i > first and is_full:
            yield first, i
            first, tokens = i, 0
        tokens += need
    yield first, len(sequences)


@torch.inference_mode()
def _score_batch(
    scheduler: Any,
    sequences: Sequence[_Sequence],
    adapters: dict[str, str | None],
    sums: dict[str, list[float]],
) -> int:
    """Score one batch into ``sums``; returns the tokens computed."""
    # Adapter by adapter: neighbours under one adapter share their LoRA matmuls.
    copies = [(slot, uid, sequence) for slot, uid in adapters.items() for sequence in sequences]
    requests = [
        compat.scoring_request(f"mezo-{slot}-{i}", sequence.tokens, uid, sequence.first)
        for i, (slot, uid, sequence) in enumerate(copies)
    ]
    batch, forward_batch = compat.prepare_extend(scheduler, requests)
    try:
        output = compat.model_runner(scheduler).forward(forward_batch).logits_output
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
        return int(batch.extend_num_tokens)
    finally:
        compat.release(scheduler, batch)
