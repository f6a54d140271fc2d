"""The triton backend: each program runs through its share of the vocabulary, then one merge.

V, D_in, dtype and whether there are many rows decide the tiles, the shares and their order. A call
has many rows above `MANY_ROWS`; on each side of it the number of rows decides only how many
programs there are.
"""

import torch
import triton

from mezo_kernels._arch import HOPPER, current_arch
from mezo_kernels.nll.logits import LogitsRule
from mezo_kernels.nll.triton.kernel import (
    label_logits_kernel,
    label_nll_kernel,
    merge_parts_kernel,
)

# Shares of the vocabulary where there is one block of rows: two on each multiprocessor of an H100.
MAX_SPLITS = 264
# One block of rows is bound by reading lm_head; more of them are bound by arithmetic.
MANY_ROWS = 64


def tiles_of(dtype: torch.dtype, num_rows: int, arch: int) -> dict[str, int]:
    """Tile sizes and launch options of a call."""
    if dtype == torch.float32:
        # IEEE products run on the CUDA cores, with both operands in registers.
        return {"BLOCK_T": 32, "BLOCK_V": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    tiles = {"BLOCK_T": 64, "BLOCK_V": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    if arch < HOPPER:
        # Its products keep their operands in registers, too: 4 warps and wide tiles spill.
        return tiles | {"num_warps": 8}
    if num_rows > MANY_ROWS:
        return tiles | {"BLOCK_T": 128, "BLOCK_V": 256, "num_warps": 8}
    return tiles


def label_nll_parts(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    rule: LogitsRule,
    vocab_start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (max, sum_exp, target_logit) of each row."""
    T, V = len(hidden), len(lm_head)
    merged = torch.empty(3, T, dtype=torch.float32, device=hidden.device)
    maximum, sum_exp, target_logit = merged.unbind()
    if not T:
        return maximum, sum_exp, target_logit
    # Triton launches on the current device.
    with torch.cuda.device_of(hidden):
        tiles = tiles_of(hidden.dtype, T, current_arch())
        tiles_per_split = triton.cdiv(triton.cdiv(V, tiles["BLOCK_V"]), MAX_SPLITS)
        num_splits = triton.cdiv(V, tiles_per_split * tiles["BLOCK_V"])
        parts = torch.empty(3, num_splits, T, dtype=torch.float32, device=hidden.device)
        label_nll_kernel[(triton.cdiv(T, tiles["BLOCK_T"]), num_splits)](
            hidden,
            lm_head,
            lm_head if bias is None else bias,
            targets.contiguous(),
            parts,
            hidden.stride(0),
            lm_head.stride(0),
            T,
            V,
            hidden.shape[1],
            vocab_start,
            tiles_per_split,
            rule.scale,
            rule.soft_cap,
            HAS_BIAS=bias is not None,
            HAS_CAP=rule.soft_cap != 0,
            **tiles,
        )
        merge_parts_kernel[(triton.cdiv(T, 32),)](
            parts, merged, T, num_splits, BLOCK_T=32, BLOCK_S=32
        )
    return maximum, sum_exp, target_logit


def label_logits(
    hidden: torch.Tensor, lm_head: torch.Tensor, bias: torch.Tensor | None, rule: LogitsRule
) -> torch.Tensor:
    """Return the logits of all rows of ``lm_head``, `[T, L]` fp32."""
    T, L = len(hidden), len(lm_head)
    logits = torch.empty(T, L, dtype=torch.float32, device=hidden.device)
    if not T:
        return logits
    with torch.cuda.device_of(hidden):
        # Labels are few: the smallest tile of tl.dot, and the block of few rows.
        tiles = tiles_of(hidden.dtype, 1, current_arch()) | {"BLOCK_V": 16}
        label_logits_kernel[(triton.cdiv(T, tiles["BLOCK_T"]), triton.cdiv(L, 16))](
            hidden,
            lm_head,
            lm_head if bias is None else bias,
            logits,
            hidden.stride(0),
            lm_head.stride(0),
            T,
            L,
            hidden.shape[1],
            rule.scale,
            rule.soft_cap,
            HAS_BIAS=bias is not None,
            HAS_CAP=rule.soft_cap != 0,
            **tiles,
        )
    return logits
