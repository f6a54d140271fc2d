"""Few-shot training sets: the first k examples of each label in a shuffled order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mezo._inputs import require
from mezo.data.example import Example


def k_shot(examples: Sequence[Example], k: int, *, seed: int) -> list[Example]:
    """Draw ``k`` examples of each label without replacement; of completions ``k`` in all.

    Args:
        examples: to draw from.
        k: of each label.
        seed: of the draw.

    Returns:
        The examples in a shuffled order, the same for the same seed.

    Raises:
        ValueError: a label has fewer.
    """
    by_label: dict[int | None, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    rng = random.Random(seed)
    chosen = []
    for label in sorted(by_label, key=lambda label: -1 if label is None else label):
        there = by_label[label]
        require(
            len(there) >= k,
            f"train: k_shot must be at most the number of examples of each label, got {k} for "
            f"{len(there)} examples of label {label}; lower k_shot.",
        )
        chosen += rng.sample(there, k)
    rng.shuffle(chosen)
    return chosen
