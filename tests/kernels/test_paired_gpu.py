"""Attention of shared prefixes and label losses on a GPU; the same bodies run on the CPU here."""

from __future__ import annotations

import pytest
import torch

import mezo_kernels as mk
from tests.support.gates import assert_close_to_reference
from tests.support.shared_prefix import (
    Batch,
    bound,
    is_twins,
    random_batch,
    shuffle_rows,
    twin_rows,
)

# Prefixes of none, one, a tile's neighbours and several parts; empty rows and groups.
RAGGED = [(0, (3, 1, 4)), (1, (2, 2)), (33, (5, 0, 2)), (65, (2, 2)), (1500, (20, 3)), (7, ())]
TWINS = [(90, (3, 3)), (0, (2, 2)), (1100, (5, 7, 5, 7)), (10, (1,) * 64)]
SHAPES = [(2, 2, 64, 64), (9, 3, 80, 80), (8, 1, 128, 128), (4, 1, 256, 256), (6, 2, 96, 64)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def on(device: str, batch: Batch) -> Batch:
    return Batch([t.to(device) for t in batch.tensors], batch.ranges, batch.scale)


def make(dtype, shape, groups=RAGGED):
    heads, kv_heads, dim, v_dim = shape
    return random_batch(
        groups, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim, dtype=dtype, seed=11
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_against_float64(device, dtype, shape):
    for soft_cap in (0.0, 2.0):
        batch, options = make(dtype, shape), {"soft_cap": soft_cap, "return_lse": True}
        reference, reference_lse = batch.reference(**options)
        same, same_lse = batch.attend(backend="reference", **options)
        ours, lse = on(device, batch).attend(**options)
        assert_close_to_reference(ours.cpu(), same, reference, bound(batch, reference))
        assert_close_to_reference(lse.cpu(), same_lse, reference_lse, 2**-24 * 16 * shape[2] ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twins_have_the_same_bits_in_any_order(device, dtype):
    for shape in SHAPES:
        batch = make(dtype, shape, TWINS)
        twin_rows(batch)
        out = on(device, batch).attend()
        assert is_twins(batch, out)
        shuffled, plan, places = shuffle_rows(batch, 3)
        again = on(device, shuffled).attend(plan=plan)
        assert torch.equal(again[places.to(device)], out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_label_nll_against_float64_and_in_company(device, dtype):
    generator = torch.Generator().manual_seed(5)
    # Few rows, and many: their tiles differ. The last ones alone are on the same side.
    for T, first, V, D in ((3, 2, 1000, 64), (70, 5, 50_000, 256)):
        hidden = torch.randn(T, D, generator=generator).to(dtype)
        lm_head = (torch.randn(V, D, generator=generator) * 3 / D**0.5).to(dtype)
        targets = torch.randint(0, V, (T,), generator=generator)
        reference = mk.label_nll(hidden.double(), lm_head.double(), targets, backend="reference")
        same = mk.label_nll(hidden, lm_head, targets, backend="reference")
        moved = [t.to(device) for t in (hidden, lm_head, targets)]
        ours = mk.label_nll(*moved)
        limit = 2**-24 * (12 * D**0.5 + 4 * float(reference.abs().max()) + 16)
        assert_close_to_reference(ours.cpu(), same, reference, limit)
        alone = mk.label_nll(moved[0][first:], moved[1], moved[2][first:])
        assert torch.equal(alone, ours[first:])
        rows = torch.tensor([3, V - 1])
        logits = mk.label_logits(moved[0], moved[1], rows.to(device))
        expected = hidden.double() @ lm_head[rows].double().T
        assert (logits.cpu() - expected).abs().max() <= 2**-24 * 12 * D**0.5 * 12
