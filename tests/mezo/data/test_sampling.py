from __future__ import annotations

import itertools

from mezo.data.sampling import batches


def test_batches_are_a_function_of_the_seed():
    examples = [f"text {i}" for i in range(10)]

    def first(seed):
        return list(itertools.islice(batches(examples, 4, seed), 5))

    assert first(0) == first(0) != first(1)
    epoch = [example for batch in first(0)[:2] for example in batch]
    assert len(set(epoch)) == 8  # no example twice within an epoch
