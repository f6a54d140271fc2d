"""A plan as a cascade of two batches of ordinary sequences."""

from itertools import pairwise

import pytest

import mezo_kernels as mk
from bench.experiments.attention.cascade import cascade_of
from tests.support.shared_prefix import random_batch

pytestmark = pytest.mark.proof

EMPTY = mk.SharedPrefixPlan([0], [0], [0], [])
# Prefixes of none in front, in the middle and at the end; empty rows, groups without tokens.
GROUPS = [(1, (2, 2)), (0, (3, 1, 4)), (33, (5, 0, 2)), (7, ()), (130, (70, 3)), (5, (0,))]


def test_no_sequence_is_empty_and_tokens_without_a_prefix_stand_last():
    plan = random_batch(GROUPS).plan()
    cascade = cascade_of(plan)
    for indptr in (cascade.group_indptr, cascade.kv_indptr, cascade.row_indptr):
        assert all(b > a for a, b in pairwise(indptr))
    # Groups 1, 33 and 130.
    assert cascade.group_indptr == [0, 4, 11, 84]
    assert cascade.kv_indptr == [0, 1, 34, 164]
    slots = [plan.prefix_slots(group) for group in (0, 2, 4)]
    assert cascade.kv_indices.tolist() == [slot for own in slots for slot in own.tolist()]
    assert cascade.token_order == [*range(4), *range(12, 92), *range(4, 12)]
    assert cascade.row_indptr == [0, 2, 4, 9, 11, 81, 84, 87, 88, 92]
    assert (cascade.num_shared, cascade.longest_group, cascade.longest_row) == (84, 73, 70)


@pytest.mark.parametrize("groups", [[(3, (1, 1)), (0, (2,))], [(0, (1, 2))], [(2, (0,))], []])
def test_an_order_that_is_there_is_none(groups):
    cascade = cascade_of(random_batch(groups).plan() if groups else EMPTY)
    assert cascade.token_order is None
    assert len(cascade.group_indptr) == len(cascade.kv_indptr)
