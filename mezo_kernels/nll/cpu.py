"""The cpu backend: tiles of the vocabulary through torch.mm, one running log-sum-exp."""

import torch

from mezo_kernels.nll.logits import LogitsRule

# Measured with V = 49152, D = 576, fp32, one thread: 1024 and 2048 are equal within 3 %, from 4096
# on the logits of a tile leave the L2 cache.
TILE = 1024
# BLAS picks its kernel by the shape of a product, so a row's bits can depend on how many rows there
# are (MKL on AVX-512: below 4 rows on one thread, 12 on two). Multiples of 32 rows gave one result
# there, for 32 to 1024 rows; the tests check it on each host.
ROWS = 32
# Most rows of one product over a tile. Products of 32 rows, of one shape whatever T, would leave
# nothing to BLAS, but took 12 to 14 % longer for T = 96 and 512: each packs the tile again.
LARGEST_BLOCK = 512

_LOWEST = torch.finfo(torch.float32).min


def label_nll_parts(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    rule: LogitsRule,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (max, sum_exp, target_logit) of each row."""
    blocks, num_rows = _row_blocks(hidden, LARGEST_BLOCK)
    padded = sum(map(len, blocks))
    local = torch.zeros(padded, dtype=torch.int64)
    local[:num_rows] = targets - vocab_start
    maximum = torch.full((padded,), -torch.inf)
    sum_exp, target_logit = torch.zeros(padded), torch.full((padded,), -torch.inf)
    buffer = torch.empty(padded, min(TILE, len(lm_head)))
    for start in range(0, len(lm_head), TILE):
        tile = lm_head[start : start + TILE]
        logits = buffer[:, : len(tile)]
        _tile_logits(blocks, tile, logits)
        rule.apply_(logits, None if bias is None else bias[start : start + TILE].float())
        column = local - start
        picked = logits.gather(1, column.clamp(0, len(tile) - 1)[:, None])[:, 0]
        is_here = (column >= 0) & (column < len(tile))
        target_logit = torch.where(is_here, picked, target_logit)
        new_maximum = torch.maximum(maximum, logits.amax(1))
        # A row of only -inf keeps sum 0 instead of NaN.
        shift = new_maximum.clamp(min=_LOWEST)
        sum_exp.mul_(maximum.sub_(shift).exp_())
        sum_exp.add_(logits.sub_(shift[:, None]).exp_().sum(1))
        maximum = new_maximum
    return maximum[:num_rows], sum_exp[:num_rows], target_logit[:num_rows]


def label_logits(
    hidden: torch.Tensor, lm_head: torch.Tensor, bias: torch.Tensor | None, rule: LogitsRule
) -> torch.Tensor:
    """Return the logits of all rows of ``lm_head``, `[T, L]` fp32."""
    # Labels are few, so one shape whatever T costs nothing here.
    blocks, num_rows = _row_blocks(hidden, ROWS)
    logits = torch.empty(len(blocks) * ROWS, len(lm_head))
    _tile_logits(blocks, lm_head, logits)
    rule.apply_(logits, None if bias is None else bias.float())
    return logits[:num_rows]


def _row_blocks(hidden: torch.Tensor, block: int) -> tuple[tuple[torch.Tensor, ...], int]:
    """Blocks of at most ``block`` fp32 rows, filled with zeros to a multiple of `ROWS`."""
    num_rows = len(hidden)
    rows = hidden.float()
    if num_rows % ROWS:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -num_rows % ROWS))
    # No rows at all still make one block, which the caller cuts away.
    return (rows if num_rows else rows.new_zeros(ROWS, rows.shape[1])).split(block), num_rows


def _tile_logits(
    blocks: tuple[torch.Tensor, ...], tile: torch.Tensor, logits: torch.Tensor
) -> None:
    weights = tile.float().T
    for block, out in zip(blocks, logits.split(len(blocks[0])), strict=True):
        torch.mm(block, weights, out=out)
