from __future__ import annotations

import itertools
import random

import pytest

from mezo.data.sampling import batches

EXAMPLES = [f"text {i}" for i in range(10)]


def first(count, *, seed=0, **more):
    return list(itertools.islice(batches(EXAMPLES, 4, seed, **more), count))


def test_batches_are_a_function_of_the_seed():
    assert first(5) == first(5) != first(5, seed=1)
    epoch = [example for batch in first(2) for example in batch]
    assert len(set(epoch)) == 8  # no example twice within an epoch


def test_the_order_is_that_of_one_generator_s_shuffles():
    rng, expected = random.Random(3), []
    for _ in range(3):
        order = list(EXAMPLES)
        rng.shuffle(order)
        expected += [order[:4], order[4:8]]
    assert first(6, seed=3) == expected


@pytest.mark.parametrize("start", range(7))
def test_a_training_goes_on_at_the_very_next_example(start):
    assert first(6, start=start) == first(6 + start)[start:]


def test_shards_are_a_partition_of_each_batch():
    whole = first(5)
    parts = [first(5, shard=(index, 3)) for index in range(3)]
    for number, batch in enumerate(whole):
        assert sorted(x for part in parts for x in part[number]) == sorted(batch)
    assert [len(part[0]) for part in parts] == [2, 1, 1]


def test_without_shuffling_every_epoch_has_the_examples_own_order():
    assert first(3, shuffle=False) == [EXAMPLES[:4], EXAMPLES[4:8], EXAMPLES[:4]]


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 5)])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(ValueError, match=r"shard must be \(index, count\) .* got \("):
        first(1, shard=shard)


def test_fewer_examples_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="a batch of 11 examples, got 10; lower batch_size"):
        next(batches(EXAMPLES, 11, 0))
