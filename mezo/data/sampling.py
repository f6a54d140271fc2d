"""The order in which examples are trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

E = TypeVar("E")


def batches(examples: Sequence[E], batch_size: int, seed: int) -> Iterator[list[E]]:
    """Yield batches without end, reshuffled each epoch; the order is a function of the seed.

    Args:
        examples: N examples, ``batch_size`` or more.
        batch_size: examples per batch; what is left over at an epoch's end is not used in it.
        seed: of the shuffles.
    """
    rng = random.Random(seed)
    while True:
        order = list(examples)
        rng.shuffle(order)
        for i in range(0, len(order) - batch_size + 1, batch_size):
            yield order[i : i + batch_size]
