"""The arena and what is sent of it."""

from __future__ import annotations

import pickle

import pytest
import torch

from mezo.core.rows import BASE, THETA, run_slots
from mezo.core.state import AdapterSlot, AdapterState
from mezo_kernels import TensorSpec


def make_state(num_tensors: int) -> AdapterState:
    specs = [TensorSpec(f"layers.{i}.q_proj.lora_A", (4, 64)) for i in range(num_tensors)]

    slots = [
        AdapterSlot(name, f"id of {name}", [torch.zeros(spec.shape) for spec in specs])
        for name in run_slots(1)
    ]
    return AdapterState(specs, seed=3, distribution="gaussian", slots=slots)


def test_what_is_sent_is_as_large_as_the_adapter():
    state = make_state(100)
    specs, arena = pickle.loads(sent := pickle.dumps(state.pack()))
    # Views of the arena would each bring all of it: 100 times as much.
    assert len(sent) < 1.5 * 4 * state.arena.numel()
    unpacked = AdapterState.unpack(specs, arena)
    assert [spec for spec, _ in unpacked] == list(state.specs)
    for (_, values), master in zip(unpacked, state.masters, strict=True):
        assert torch.equal(values, master)


def test_packing_applies_the_update_that_was_kept_back():
    state = make_state(2)
    before = state.arena.clone()
    state.defer_update(0, [0.5])
    assert torch.equal(state.arena, before)
    _, arena = state.pack()
    assert not torch.equal(arena, before)


def holds(tensors, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_a_slot_holds_what_it_should_whenever_it_is_asked_for():
    state = make_state(2)
    theta = state.slot(THETA)
    assert holds(theta.tensors, state.masters)  # from the start
    state.defer_update(0, [0.5])
    state.perturb(1, 1e-2)
    assert not holds(theta.tensors, state.masters)  # written when it is asked for only
    assert holds(state.slot(THETA).tensors, state.masters)
    state.defer_update(1, [0.5])
    state.flush()
    state.sync({"id of another", "id of plus0", None})
    assert not holds(theta.tensors, state.masters)
    state.sync({"id of another", theta.uid})
    assert holds(theta.tensors, state.masters)
    assert state.slot("plus0").uid == "id of plus0"
    base = state.slot(BASE)
    assert (base.uid, base.tensors) == (None, ())
    with pytest.raises(ValueError, match=r"one of \['base', 'theta', .*'minus0'\], got 'plus1'"):
        state.slot("plus1")


def test_what_a_check_shows_in_thetas_slot_stays_until_it_is_undone():
    state = make_state(2)
    state.perturb(0, 0.25)
    state.show(0, 0, 0.25)
    assert holds(state.slot(THETA).tensors, state.slot("plus0").tensors)
    state.restore()
    assert holds(state.slot(THETA).tensors, state.masters)
