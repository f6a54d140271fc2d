"""The order in which examples are trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from mezo._inputs import require

E = TypeVar("E")


def batches(
    examples: Sequence[E],
    batch_size: int,
    seed: int,
    *,
    shuffle: bool = True,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[list[E]]:
    """Yield batches without end, reshuffled each epoch: batch t is a function of (seed, t).

    Args:
        examples: N examples, ``batch_size`` or more.
        batch_size: examples per batch; what is left over at an epoch's end is not used in it.
        seed: of the shuffles.
        shuffle: whether to shuffle; else every epoch has the examples' own order.
        start: batches that were taken before: where a training goes on.
        shard: (index, count): yield only this part of each batch, every ``count``-th example.

    Raises:
        ValueError: fewer examples than a batch has, or a shard that is none.
    """
    index, count = shard
    require(
        0 <= index < count <= batch_size,
        f"batches: shard must be (index, count) with index < count <= batch_size {batch_size}, got "
        f"{shard}; use (0, 1) for all.",
    )
    require(
        len(examples) >= batch_size,
        f"batches: there must be a batch of {batch_size} examples, got {len(examples)}; lower "
        "batch_size.",
    )
    rng = random.Random(seed)
    per_epoch = len(examples) // batch_size
    first_epoch, first_batch = divmod(start, per_epoch)
    epoch = 0
    while True:
        order = list(examples)
        if shuffle:
            rng.shuffle(order)  # also for epochs that are left out: the next one depends on it
        if epoch >= first_epoch:
            begin = first_batch if epoch == first_epoch else 0
            for number in range(begin, per_epoch):
                batch = order[number * batch_size : (number + 1) * batch_size]
                yield batch[index::count]
        epoch += 1
