"""`LogprobProcessor`: its scores, and that nothing in it waits for the device."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mezo.engines.sglang.cpu_host.host import prepare_import

pytestmark = pytest.mark.sglang

prepare_import()
RULE = {"soft_cap": 0.0, "logit_scale": 1.0}


@pytest.fixture
def logprobs(no_engine_noise):
    from mezo.engines.sglang.batch import logprobs

    return logprobs


def head(weight, first=0):
    """An lm_head, or the rows of it that a rank has."""
    shard = SimpleNamespace(num_org_elements=len(weight), org_vocab_start_index=first)
    return SimpleNamespace(weight=weight, shard_indices=shard)


def wanted_of(logprobs, rng, count, vocab, share):
    """What to score: every position once or twice, ``share`` of them as log-likelihoods."""
    wanted = logprobs.Wanted()
    for _ in range(count):
        wanted.add(rng.randrange(24), rng.randrange(vocab), rng.random() < share)
    return wanted


def group(**functions):
    return SimpleNamespace(**{"world_size": 1, **functions})


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_scores_are_those_of_all_logits_in_the_order_asked_for(logprobs, share):
    rng = random.Random(share)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(32, 48, generator=generator)
    weight = torch.randn(97, 48, generator=generator)
    wanted = wanted_of(logprobs, rng, 40, len(weight), share)
    logits = hidden.double() @ weight.double().T
    likely = logits.log_softmax(1)
    expected = [
        float((likely if is_normalised else logits)[position, token])
        for position, token, is_normalised in zip(
            wanted.positions, wanted.tokens, wanted.is_normalised, strict=True
        )
    ]
    for prepared in (head(weight), head(weight.clone()), None):  # known before, another, unknown
        processor = logprobs.LogprobProcessor(group(), wanted, RULE)
        if prepared is not None:
            processor.prepare(prepared)
        # The rows behind the 24 of the batch fill up a graph.
        processor(torch.zeros(32), hidden, head(weight))
        assert processor.result() == pytest.approx(expected, abs=1e-4)


def test_ranks_that_share_the_vocabulary_have_one_score(logprobs):
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(24, 16, generator=generator)
    weight = torch.randn(60, 16, generator=generator)
    wanted = wanted_of(logprobs, rng, 30, 60, 0.0)
    whole = logprobs.LogprobProcessor(group(), wanted, RULE)
    whole(torch.zeros(24), hidden, head(weight))
    picked = []
    for first, last in ((0, 25), (25, 60)):
        own = group(world_size=2, all_reduce=lambda scores: picked.append(scores) or scores)
        rank = logprobs.LogprobProcessor(own, wanted, RULE)
        rank(torch.zeros(24), hidden, head(weight[first:last], first))
    torch.testing.assert_close(sum(picked), torch.tensor(whole.result()))
    assert all((scores == 0).any() for scores in picked)


class Recorder(TorchDispatchMode):
    """Notes the operators that run, and what they read of the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert all(t.device.type == "meta" for t in tensors), f"{function} reads a host's tensor"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_between_forward_and_result_nothing_waits_for_the_device(logprobs, monkeypatch, share):
    """On the meta device whatever needs a value on the host raises: masks, unique, item."""
    monkeypatch.setattr(logprobs, "label_nll", lambda hidden, *_, **__: hidden.sum(1))
    monkeypatch.setattr(
        logprobs, "label_logits", lambda hidden, weight, rows, **_: hidden @ weight[rows].T
    )
    wanted = wanted_of(logprobs, random.Random(2), 40, 97, share)
    lm_head = head(torch.empty(97, 48, device="meta"))
    processor = logprobs.LogprobProcessor(group(), wanted, RULE)
    processor.prepare(lm_head)
    ids, hidden = torch.empty(32, device="meta"), torch.empty(32, 48, device="meta")
    with Recorder() as recorder:
        processor(ids, hidden, lm_head)
    assert "aten.index_select.default" in recorder.names
    banned = ("nonzero", "unique", "_local_scalar_dense", "lift_fresh", "_to_copy")
    assert not [name for name in recorder.names if any(word in name for word in banned)]
    with Recorder() as late, pytest.raises(AssertionError, match="a host's tensor"):
        logprobs.LogprobProcessor(group(), wanted, RULE)(ids, hidden, lm_head)
    assert late.names


def test_a_forward_past_it_is_an_error(logprobs):
    processor = logprobs.LogprobProcessor(group(), logprobs.Wanted([0], [1], [True]), RULE)
    with pytest.raises(RuntimeError, match="must end in the model's logits processor"):
        processor.result()
    nothing = logprobs.LogprobProcessor(group(), logprobs.Wanted(), RULE)
    nothing(torch.zeros(3), torch.zeros(3, 8), object())  # a prompt's: any lm_head will do
    assert nothing.result() == []


def test_a_forward_past_the_attention_is_an_error(no_engine_noise):
    from mezo.engines.sglang.batch.attention import PairedAttention

    backend = PairedAttention(SimpleNamespace(forward=lambda *_: "own", token_to_kv_pool="pool"))
    told = []
    backend.engines_own.init_forward_metadata = told.append

    def past_it():
        with backend.paired(SimpleNamespace()):
            backend.init_forward_metadata("batch")
            assert backend.token_to_kv_pool == "pool"

    with pytest.raises(RuntimeError, match="layers must call the engine's attention"):
        past_it()
    assert told == []
    with backend.paired(SimpleNamespace()):
        backend.init_forward_metadata("batch")
        # A layer that shares another's keys is the engine's own.
        assert backend.forward(None, None, None, None, None) == "own"
        assert told == ["batch"]
        backend.forward(None, None, None, None, None)
    assert told == ["batch"]
    backend.init_forward_metadata("served")
    assert told == ["batch", "served"]
