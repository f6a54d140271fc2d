"""The arena and what is sent of it."""

from __future__ import annotations

import pickle

import torch

from mezo.core.state import AdapterState
from mezo_kernels import TensorSpec


def make_state(num_tensors: int) -> AdapterState:
    specs = [TensorSpec(f"layers.{i}.q_proj.lora_A", (4, 64)) for i in range(num_tensors)]

    def slot():
        return [torch.zeros(spec.shape) for spec in specs]

    return AdapterState(
        specs, seed=3, distribution="gaussian", pairs=[(slot(), slot())], theta=slot()
    )


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
