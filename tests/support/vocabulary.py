"""Label losses over a vocabulary that is split, without processes."""

from collections.abc import Sequence
from itertools import pairwise

import torch

import mezo_kernels as mk


def nll_of_shards(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    cuts: Sequence[int],
    *,
    bias: torch.Tensor | None = None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of all shards, `[shards, 3, T]`, and the loss that the last one returns."""
    parts: list[torch.Tensor] = []

    def all_gather(own: torch.Tensor) -> torch.Tensor:
        parts.append(own)
        return torch.stack(parts)

    for start, stop in pairwise((0, *cuts, len(lm_head))):
        merged = mk.label_nll(
            hidden,
            lm_head[start:stop],
            targets,
            bias=None if bias is None else bias[start:stop],
            vocab_start=start,
            all_gather=all_gather,
            backend=backend,
        )
    return torch.stack(parts), merged
