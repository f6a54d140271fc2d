"""Scores rows under adapter slots: every row and sign in one extend batch, scalars out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mezo.core import Scores
from mezo.sglang import compat


def score_rows(
    scheduler: Any,
    rows: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    adapters: dict[str, str | None],
) -> Scores:
    """Score every row under every adapter, all of them in one batch where they fit.

    A batch that exceeds the engine's token budget is cut into chunks of whole rows; all adapters'
    copies of a row stay in one batch, so that both signs always see the same batch.

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
    sums: dict[str, list[float]] = {slot: [] for slot in adapters}
    tokens = forwards = 0
    for first, last in _chunks(scheduler, rows, len(adapters)):
        values, computed = _score_batch(
            scheduler, rows[first:last], prompt_lens[first:last], adapters
        )
        for slot, chunk in values.items():
            sums[slot] += chunk
        tokens += computed
        forwards += 1
    return Scores(sums, tokens=tokens, forwards=forwards)


def budget(scheduler: Any) -> tuple[int, int]:
    """Tokens and rows that one scoring batch may have now."""
    free = compat.free_memory(scheduler)
    limit = int(scheduler.server_args.max_prefill_tokens)
    return min(free["kv_tokens"], limit), free["request_slots"]


def _chunks(
    scheduler: Any, rows: Sequence[Sequence[int]], copies: int
) -> Iterator[tuple[int, int]]:
    """Cut rows into runs whose copies fit into one batch."""
    max_tokens, max_rows = budget(scheduler)
    page = int(scheduler.page_size)
    first = tokens = 0
    for i, row in enumerate(rows):
        need = copies * (-(-len(row) // page) * page)
        if need > max_tokens or copies > max_rows:
            raise ValueError(
                f"step: {copies} copies of row {i} ({len(row)} tokens) must fit into the engine, "
                f"got {max_tokens} free KV tokens and {max_rows} free request slots; shorten the "
                "row or start the engine with larger max_total_tokens and max_running_requests."
            )
        if i > first and (tokens + need > max_tokens or (i - first + 1) * copies > max_rows):
            yield first, i
            first, tokens = i, 0
        tokens += need
    yield first, len(rows)


@torch.inference_mode()
def _score_batch(
    scheduler: Any,
    rows: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    adapters: dict[str, str | None],
) -> tuple[dict[str, list[float]], int]:
    """Score one batch; returns the sums by slot and the tokens computed."""
    # Adapter by adapter: neighbours under one adapter share their LoRA matmuls.
    requests = [
        compat.scoring_request(f"mezo-{slot}-{i}", row, uid, prompt_len - 1)
        for slot, uid in adapters.items()
        for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens, strict=True))
    ]
    batch, forward_batch = compat.prepare_extend(scheduler, requests)
    try:
        output = compat.model_runner(scheduler).forward(forward_batch).logits_output
        # Per request: one value a scored token, then one that belongs to no prompt token.
        lengths = [len(row) - p + 1 for row, p in zip(rows, prompt_lens, strict=True)]
        flat = output.input_token_logprobs.double().cpu()
        pieces = iter(flat.split(lengths * len(adapters)))
        sums = {
            slot: [float(piece[:-1].sum()) for piece in itertools.islice(pieces, len(rows))]
            for slot in adapters
        }
        return sums, int(batch.extend_num_tokens)
    finally:
        compat.release(scheduler, batch)
