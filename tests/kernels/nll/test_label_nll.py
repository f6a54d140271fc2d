"""label_nll and label_logits on the CPU: against float64, with other rows, in shards."""

import math

import pytest
import torch
import torch.nn.functional as F

import mezo_kernels as mk
from mezo_kernels.nll import cpu
from tests.support.gates import assert_close_to_reference
from tests.support.vocabulary import nll_of_shards

# V: less than a tile, a tile and its neighbours, several tiles with a tail.
VOCABS = (1, 37, cpu.TILE - 1, cpu.TILE, cpu.TILE + 1, 2600)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The spread of the logits of `inputs`.
SPREAD = 3.0


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(T, V, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator).to(dtype)
    lm_head = (torch.randn(V, D, generator=generator) * SPREAD / math.sqrt(D)).to(dtype)
    return hidden, lm_head, torch.randint(0, V, (T,), generator=generator)


def bound(D, reference):
    """A dot of D products rounds like a random walk of D steps, at the size of its logit."""
    return 2**-24 * (4 * math.sqrt(D) * SPREAD + 4 * float(reference.abs().max()))


def reference_of(hidden, lm_head, targets, **options):
    bias = options.pop("bias", None)
    options["bias"] = None if bias is None else bias.double()
    return mk.label_nll(hidden.double(), lm_head.double(), targets, backend="reference", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABS)
# One row, less than a block, a block and its neighbours, several.
@pytest.mark.parametrize("T", [1, 31, 32, 33, 70])
def test_cpu_against_float64(T, V, dtype):
    # 70 rows whatever T, in calls of T: the largest error of one row says little.
    hidden, lm_head, targets = inputs(70, V, 48, dtype)
    calls = zip(hidden.split(T), targets.split(T), strict=True)
    ours = torch.cat([mk.label_nll(h, lm_head, t, backend="cpu") for h, t in calls])
    assert ours.dtype == torch.float32
    reference = reference_of(hidden, lm_head, targets)
    torch_logits = F.linear(hidden, lm_head).float()
    torch_nll = F.cross_entropy(torch_logits, targets, reduction="none")
    assert_close_to_reference(ours, torch_nll, reference, bound(48, reference))


def test_reference_is_the_cross_entropy_of_torch():
    hidden, lm_head, targets = (
        x.double() if x.is_floating_point() else x for x in inputs(9, 50, 8)
    )
    expected = F.cross_entropy(hidden @ lm_head.T, targets, reduction="none")
    ours = mk.label_nll(hidden, lm_head, targets, backend="reference")
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("soft_cap", "logit_scale"), [(0.0, 0.5), (5.0, 1.0), (2.0, 3.0)])
def test_cap_scale_and_bias(soft_cap, logit_scale, with_bias):
    hidden, lm_head, targets = inputs(5, 2600, 64)
    bias = torch.randn(2600, generator=torch.Generator().manual_seed(1)) if with_bias else None
    options = {"soft_cap": soft_cap, "logit_scale": logit_scale, "bias": bias}
    reference = reference_of(hidden, lm_head, targets, **options)
    own = hidden.double() @ lm_head.double().T + (0 if bias is None else bias.double())
    own = own * logit_scale
    own = soft_cap * torch.tanh(own / soft_cap) if soft_cap else own
    expected = F.cross_entropy(own, targets, reduction="none")
    torch.testing.assert_close(reference, expected, rtol=1e-13, atol=1e-13)
    ours = mk.label_nll(hidden, lm_head, targets, backend="cpu", **options)
    same = mk.label_nll(hidden, lm_head, targets, backend="reference", **options)
    assert_close_to_reference(ours, same, reference, max(1.0, logit_scale) * bound(64, reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_company(dtype, threads):
    # More rows than one product has.
    hidden, lm_head, targets = inputs(550, 1100, 576, dtype)
    together = mk.label_nll(hidden, lm_head, targets, backend="cpu")
    # Two threads of a busy machine wait for each other at every product.
    lengths = (1, 2, 3, 4, 7, 16, 33, 64, 99, 200, 512, 513, 549) if threads == 1 else (1, 33, 513)
    for T in lengths:
        alone = mk.label_nll(hidden[-T:], lm_head, targets[-T:], backend="cpu")
        assert torch.equal(alone, together[-T:]), T
    rows = torch.tensor([5, 17, 1099])
    logits = mk.label_logits(hidden, lm_head, rows, backend="cpu")
    for T in lengths:
        assert torch.equal(mk.label_logits(hidden[-T:], lm_head, rows, backend="cpu"), logits[-T:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plus_and_minus_of_one_content_have_the_same_bits(dtype, threads):
    hidden, lm_head, targets = inputs(45, 2600, 100, dtype)
    ours = mk.label_nll(hidden.repeat(2, 1), lm_head, targets.repeat(2), backend="cpu")
    assert torch.equal(ours[:45], ours[45:])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cuts", [(1300,), (1, 1025, 2599)])
def test_shards_merge_to_the_whole(cuts, backend):
    hidden, lm_head, targets = inputs(20, 2600, 64)
    targets[:4] = torch.tensor([0, 1, 1300, 2599])
    whole = mk.label_nll(hidden, lm_head, targets, backend=backend)
    parts, merged = nll_of_shards(hidden, lm_head, targets, cuts, backend=backend)
    assert parts.dtype == torch.float32
    _, sum_exp, target_logit = parts.unbind(1)
    assert (sum_exp >= 1).all()
    assert (target_logit.isfinite().sum(0) == 1).all()
    assert float((merged - whole).abs().max()) <= bound(64, whole)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_masked_tokens_and_foreign_targets(backend):
    hidden, lm_head, targets = inputs(3, 2600, 16)
    # The first two tiles hold masked tokens only.
    bias = torch.zeros(2600).index_fill_(0, torch.arange(2100), -torch.inf)
    targets = torch.tensor([2200, 5, 2600])
    ours = mk.label_nll(hidden, lm_head, targets, bias=bias, backend=backend)
    alone = mk.label_nll(hidden, lm_head[2100:], targets, vocab_start=2100, backend=backend)
    torch.testing.assert_close(ours, alone)
    assert ours[0].isfinite()
    assert ours[1:].tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_label_logits_give_the_loss_over_options(backend):
    hidden, lm_head, _ = inputs(40, 300, 64)
    rows = torch.tensor([7, 299, 0, 7])
    bias = torch.randn(300, generator=torch.Generator().manual_seed(2))
    options = {"bias": bias, "soft_cap": 4.0, "logit_scale": 2.0, "backend": backend}
    ours = mk.label_logits(hidden, lm_head, rows, **options)
    assert ours.shape == (40, 4)
    assert torch.equal(ours[:, 0], ours[:, 3])
    # Differences of label logits are differences of log-likelihoods: the normaliser cancels.
    nll = [mk.label_nll(hidden, lm_head, row.repeat(40), **options) for row in rows]
    expected = torch.stack(nll, 1).neg().log_softmax(1)
    torch.testing.assert_close(ours.log_softmax(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_rows(backend):
    _, lm_head, _ = inputs(1, 50, 8)
    none = torch.empty(0, 8)
    empty = torch.empty(0, dtype=torch.int64)
    assert mk.label_nll(none, lm_head, empty, backend=backend).shape == (0,)
    assert mk.label_logits(none, lm_head, torch.tensor([1]), backend=backend).shape == (0, 1)


def test_strided_hidden_states_and_weights():
    hidden, lm_head, targets = inputs(6, 1500, 40)
    wide = torch.zeros(6, 80).index_add_(1, torch.arange(40), hidden)[:, :40]
    padded = torch.cat((lm_head, torch.full((1500, 3), torch.nan)), 1)[:, :40]
    expected = mk.label_nll(hidden, lm_head, targets, backend="cpu")
    assert torch.equal(mk.label_nll(wide, padded, targets, backend="cpu"), expected)


HIDDEN, WEIGHT, TARGETS = inputs(4, 10, 8)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden and lm_head must be \[T, D_in\]"),
        ({"lm_head": WEIGHT[:, :7]}, ValueError, r"hidden and lm_head must be \[T, D_in\]"),
        ({"lm_head": WEIGHT.half()}, ValueError, "must have one dtype"),
        ({"hidden": HIDDEN.double(), "lm_head": WEIGHT.double()}, ValueError, "one dtype"),
        ({"lm_head": WEIGHT[:0]}, ValueError, "lm_head must have rows"),
        ({"lm_head": WEIGHT.T.contiguous().T}, ValueError, r"stride\(-1\) == 1"),
        ({"hidden": HIDDEN.T.contiguous().T}, ValueError, r"stride\(-1\) == 1"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias must be \[V\]"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap must be >= 0"),
        ({"lm_head": WEIGHT.to("meta")}, ValueError, "lm_head must be on cpu"),
        ({"targets": TARGETS[:3]}, ValueError, r"targets must be \[T\]"),
        ({"targets": TARGETS.int()}, ValueError, r"targets must be \[T\]"),
        ({"targets": TARGETS.to("meta")}, ValueError, "targets must be on cpu"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, NotImplementedError, "no CUDA C\\+\\+ backend, use 'triton'"),
        ({"backend": "triton"}, RuntimeError, "'triton' is not usable here"),
    ],
)
def test_bad_input(changes, error, match, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"hidden": HIDDEN, "lm_head": WEIGHT, "targets": TARGETS} | {"backend": "cpu"}
    arguments |= changes
    tensors = [arguments.pop(name) for name in ("hidden", "lm_head", "targets")]
    with pytest.raises(error, match=match) as caught:
        mk.label_nll(*tensors, **arguments)
    assert str(caught.value).startswith("label_nll: ")


def test_bad_label_rows_and_parts():
    with pytest.raises(ValueError, match=r"label_rows must be \[L\] torch.int64"):
        mk.label_logits(HIDDEN, WEIGHT, torch.tensor([1], dtype=torch.int32))
    with pytest.raises(IndexError):
        mk.label_logits(HIDDEN, WEIGHT, torch.tensor([10]))
    for parts in (torch.zeros(3, 4), torch.zeros(0, 3, 4), torch.zeros(2, 3, 5)):
        with pytest.raises(ValueError, match=r"label_nll: all_gather must return \[shards, 3, T\]"):
            mk.label_nll(HIDDEN, WEIGHT, TARGETS, all_gather=lambda _, parts=parts: parts)


def test_environment_chooses(monkeypatch):
    calls = []
    label_nll_parts = cpu.label_nll_parts
    monkeypatch.setattr(cpu, "label_nll_parts", lambda *a: calls.append(1) or label_nll_parts(*a))
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "reference")
    mk.label_nll(HIDDEN, WEIGHT, TARGETS)
    assert not calls
    # `cuda` is meant for operations that have a CUDA backend.
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "cuda")
    mk.label_nll(HIDDEN, WEIGHT, TARGETS)
    assert calls
    monkeypatch.setenv("MEZO_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="MEZO_KERNELS_BACKEND must be one of"):
        mk.label_nll(HIDDEN, WEIGHT, TARGETS)
