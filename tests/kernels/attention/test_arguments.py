"""What shared_prefix_attention and its plan accept and refuse; backends that callers bring."""

import logging

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels.attention import AttentionInputs
from tests.support.shared_prefix import random_batch

BACKENDS = ("reference", "cpu")
BATCH = random_batch([(4, (2, 2))])

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize(
    ("position", "change", "error", "match"),
    [
        (0, lambda t: t[0], ValueError, "must have 3 dimensions"),
        (0, lambda t: t[:3], ValueError, r"q must be \(4, 4, 16\)"),
        (1, lambda t: t[:3], ValueError, r"k_suffix must be \(4, 2, 16\)"),
        (2, lambda t: t[:3], ValueError, r"v_suffix must be \(4, 2, 16\)"),
        (3, lambda t: t[..., :8], ValueError, "k_cache must be"),
        (4, lambda t: t[:3], ValueError, "v_cache must be"),
        (0, lambda t: t[:, :3], ValueError, "multiple of the KV heads, got 3 and 2"),
        (3, lambda t: t.half(), ValueError, "k_cache must have the dtype of q"),
        (4, lambda t: t.to("meta"), ValueError, "v_cache must be on cpu"),
        (0, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "stride"),
    ],
)
def test_bad_tensors(position, change, error, match):
    tensors = list(BATCH.tensors)
    tensors[position] = change(tensors[position])
    with pytest.raises(error, match=match) as caught:
        mk.shared_prefix_attention(*tensors, **BATCH.ranges, scale=1.0, backend="cpu")
    assert str(caught.value).startswith("shared_prefix_attention: ")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"soft_cap": -1.0}, ValueError, "soft_cap must be >= 0"),
        ({"plan": BATCH.plan(), **BATCH.ranges}, ValueError, "None beside a plan"),
        ({"kv_indices": None}, ValueError, "must all be given"),
        ({"out": torch.empty(4, 4, 15)}, ValueError, r"out must be \(4, 4, 16\)"),
        ({"out": torch.empty(4, 16, 4).transpose(1, 2)}, ValueError, "out must be contiguous"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, NotImplementedError, "no CUDA C\\+\\+ backend"),
        ({"backend": "triton"}, RuntimeError, "'triton' is not usable here"),
    ],
)
def test_bad_options(options, error, match, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=match) as caught:
        BATCH.attend(**({"backend": "cpu"} | options))
    assert str(caught.value).startswith("shared_prefix_attention: ")


def test_an_object_is_a_backend():
    seen = []

    class Mine:
        def attend(self, inputs: AttentionInputs, out, lse):
            seen.append((inputs.scale, inputs.soft_cap, inputs.plan))
            out.copy_(inputs.q)
            lse.fill_(7.0)

    batch, plan = random_batch([(4, (3, 20))]), random_batch([(4, (3, 20))]).plan()
    out, lse = batch.attend(backend=Mine(), plan=plan, soft_cap=2.0, return_lse=True)
    assert seen == [(batch.scale, 2.0, plan)]
    assert torch.equal(out, batch.tensors[0])
    assert torch.equal(lse, torch.full((23, 4), 7.0))
    with pytest.raises(ValueError, match="q must have the dtype of q"):
        batch.to(torch.float64).attend(backend=Mine())
    assert len(seen) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_outside_the_cache_are_refused(backend):
    ranges = BATCH.ranges | {"kv_indices": torch.tensor([0, 1, 2, len(BATCH.tensors[3])])}
    with pytest.raises(IndexError):
        mk.shared_prefix_attention(*BATCH.tensors, **ranges, scale=1.0, backend=backend)


def test_every_call_checks_the_slots():
    q, k, v, k_cache, v_cache = BATCH.tensors
    ranges = BATCH.ranges | {"kv_indices": torch.tensor([0, 1, 2, 3])}
    options = {"plan": mk.SharedPrefixPlan(**ranges), "scale": 1.0, "backend": "cpu"}
    expected = mk.shared_prefix_attention(q, k, v, k_cache, v_cache, **options)
    with pytest.raises(IndexError, match="slots of the caches, 0 to 2, got 0 to 3; pass"):
        mk.shared_prefix_attention(q, k, v, k_cache[:3], v_cache[:3], **options)
    # What was checked is a copy.
    ranges["kv_indices"].fill_(1 << 40)
    assert torch.equal(
        mk.shared_prefix_attention(q, k, v, k_cache, v_cache, **options).nan_to_num(7.0),
        expected.nan_to_num(7.0),
    )
    ranges["kv_indices"] = torch.tensor([0, 1, 2, -1])
    with pytest.raises(IndexError, match="got -1 to 2"):
        mk.shared_prefix_attention(*BATCH.tensors, **ranges, scale=1.0, backend="cpu")


def test_works_without_the_native_module(no_native, caplog):
    with caplog.at_level(logging.INFO, logger="mezo_kernels"):
        ours = BATCH.attend()
    assert torch.equal(ours, BATCH.attend(backend="reference"))
    assert "slow reference backend on cpu: The native module" in caplog.text
    with pytest.raises(RuntimeError, match="backend='cpu' is not usable here: The native module"):
        BATCH.attend(backend="cpu")


def test_fp64_and_wide_heads_are_refused():
    with pytest.raises(ValueError, match="q must have the dtype of q, one of"):
        BATCH.to(torch.float64).attend(backend="cpu")
    with pytest.raises(NotImplementedError, match="head dims must be 1 to 256, got 288"):
        random_batch([(1, (1,))], dim=288).attend(backend="cpu")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"qo_indptr": [1, 2, 4]}, "qo_indptr must begin at 0"),
        ({"qo_indptr": [0, 3, 2]}, "qo_indptr must begin at 0 and never decrease"),
        ({"qo_indptr": []}, "qo_indptr must be a list"),
        ({"qo_indptr": [0.0, 2.0, 4.0]}, "qo_indptr must be a list or a 1-D tensor of ints"),
        ({"group_indptr": [0, 1]}, "group_indptr must end at the number of rows, 2, got 1"),
        ({"kv_indptr": [0]}, "kv_indptr must have one entry per group and one more, 2, got 1"),
        ({"kv_indices": [1, 2]}, r"kv_indices must be \[4\]"),
    ],
)
def test_bad_plans(changes, match):
    with pytest.raises(ValueError, match=match) as caught:
        mk.SharedPrefixPlan(**(BATCH.ranges | changes))
    assert str(caught.value).startswith("SharedPrefixPlan: ")
    assert ";" in str(caught.value)
