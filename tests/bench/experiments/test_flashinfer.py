"""The flashinfer backend: its packing, bases and caches on a stand-in, the real one on a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

import mezo_kernels as mk
from bench.experiments.attention import flashinfer as backend
from tests.bench.experiments import fake_flashinfer
from tests.support.gates import assert_close_to_reference
from tests.support.shared_prefix import Batch, bound, random_batch, shuffle_rows

pytestmark = pytest.mark.proof

# Groups without a prefix in the middle and at the end, empty rows, groups without tokens.
RAGGED = [
    (1, (2, 2)),
    (0, (3, 1, 4)),
    (33, (5, 0, 2)),
    (7, ()),
    (90, (20, 3)),
    (0, (1,)),
    (5, (0,)),
]
IN_ORDER = [(3, (2, 1)), (40, (1, 4)), (0, (2,))]
SHAPES = [(2, 2, 64), (9, 3, 64), (8, 1, 128)]
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def stand_in(monkeypatch):
    """FlashInfer's stand-in, on any device."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(backend, "reason_against", lambda device_type: None)
    monkeypatch.setattr(fake_flashinfer, "plans", [])
    backend.workspace.cache_clear()
    yield fake_flashinfer
    backend.workspace.cache_clear()


def make(dtype, shape, groups=RAGGED):
    heads, kv_heads, dim = shape
    return random_batch(groups, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, seed=8)


def limit(batch, reference):
    """Two partial results and their sum are rounded, not one result."""
    return bound(batch, reference) + 2 * torch.finfo(batch.tensors[0].dtype).eps * float(
        reference.abs().max()
    )


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(stand_in, dtype, shape, soft_cap):
    batch, options = make(dtype, shape), {"soft_cap": soft_cap, "return_lse": True}
    reference, reference_lse = batch.reference(**options)
    same, same_lse = batch.attend(backend="reference", **options)
    ours, lse = batch.attend(backend=backend, **options)
    assert lse.dtype == torch.float32
    assert_close_to_reference(ours, same, reference, limit(batch, reference))
    assert_close_to_reference(lse, same_lse, reference_lse, 2**-24 * 16 * shape[2] ** 0.5)


@pytest.mark.parametrize("groups", [RAGGED, IN_ORDER], ids=["ragged", "in order"])
def test_rows_in_any_order(stand_in, groups):
    batch = make(torch.float16, SHAPES[1], groups)
    expected = batch.attend(backend=backend, return_lse=True)
    shuffled, plan, places = shuffle_rows(batch, 5)
    out = torch.full_like(expected[0], torch.nan)
    ours, lse = shuffled.attend(plan=plan, backend=backend, return_lse=True, out=out)
    assert ours is out
    assert torch.equal(ours[places], expected[0])
    assert torch.equal(lse[places], expected[1])


def test_layers_share_the_planned_wrappers(stand_in):
    batch = make(torch.float16, SHAPES[0], IN_ORDER)
    plan = batch.plan()
    for _ in range(3):
        batch.attend(plan=plan, backend=backend)
    both = ["BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper"]
    assert sorted(stand_in.plans) == both
    # What is planned in must be planned again.
    batch.attend(plan=plan, backend=backend, soft_cap=3.0)
    batch.attend(plan=plan, backend=backend, scale=0.5)
    assert sorted(stand_in.plans) == sorted(3 * both)
    assert backend.workspace.cache_info().misses == 1


@pytest.mark.parametrize("groups", [[(0, (2, 1))], [(4, (0, 0))]], ids=["no prefix", "no token"])
def test_passes_that_are_empty_are_left_out(stand_in, groups):
    batch = make(torch.float16, SHAPES[0], groups)
    ours, lse = batch.attend(backend=backend, return_lse=True)
    reference, reference_lse = batch.reference(return_lse=True)
    torch.testing.assert_close(ours.double(), reference, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), reference_lse, rtol=1e-5, atol=1e-5)
    assert "BatchPrefillWithPagedKVCacheWrapper" not in stand_in.plans


def test_many_heads_are_merged_in_parts(stand_in):
    batch = make(torch.float16, (192, 2, 128), IN_ORDER)
    reference = batch.reference()
    assert float((batch.attend(backend=backend) - reference).abs().max()) <= limit(batch, reference)


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((2, 2, 80), torch.float16, "head dims must be one of"),
        ((2, 2, 64), torch.float32, "dtypes must be one of"),
    ],
)
def test_what_flashinfer_lacks_is_named(stand_in, shape, dtype, match):
    with pytest.raises(NotImplementedError, match=match):
        make(dtype, shape).attend(backend=backend)


def test_where_it_is_not_usable(monkeypatch):
    batch = make(torch.float16, SHAPES[0])
    with pytest.raises(RuntimeError, match="'flashinfer' is not usable here: It does not work on"):
        batch.attend(backend=backend)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert "does not import" in str(backend.reason_against("cuda"))
    # A stub, as hosts have it that only need `import flashinfer` to work.
    monkeypatch.setitem(sys.modules, "flashinfer", type(sys)("flashinfer"))
    assert "has no BatchPrefillWithPagedKVCacheWrapper" in str(backend.reason_against("cuda"))
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    assert backend.reason_against("cuda") is None


def test_its_name_is_no_backend_of_the_kernels(monkeypatch):
    hidden, lm_head, targets = torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, 1])
    names = r"one of \['reference', 'cpu', 'triton'\], got 'flashinfer'"
    with pytest.raises(ValueError, match=names):
        mk.label_nll(hidden, lm_head, targets, backend="flashinfer")
    with pytest.raises(ValueError, match=names):
        make(torch.float32, SHAPES[0]).attend(backend="flashinfer")
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "flashinfer")
    with pytest.raises(ValueError, match=names):
        make(torch.float32, SHAPES[0]).attend()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_real_one_against_float64(dtype, shape):
    reason = backend.reason_against("cuda")
    if reason is not None:
        pytest.skip(reason)
    for soft_cap in (0.0, 2.0):
        batch, options = make(dtype, shape), {"soft_cap": soft_cap, "return_lse": True}
        reference, reference_lse = batch.reference(**options)
        same, same_lse = batch.attend(backend="reference", **options)
        shuffled, plan, places = shuffle_rows(batch, 5)
        moved = Batch([t.cuda() for t in shuffled.tensors], batch.ranges, batch.scale)
        results = moved.attend(plan=plan, backend=backend, **options)
        ours, lse = (result.cpu()[places] for result in results)
        assert_close_to_reference(ours, same, reference, limit(batch, reference))
        # FlashInfer's exp2 and log2 are the GPU's approximations.
        assert_close_to_reference(lse, same_lse, reference_lse, 2**-22 * 16 * shape[2] ** 0.5)
