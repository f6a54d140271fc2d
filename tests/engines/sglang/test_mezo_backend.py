"""`attention_backend="mezo"`: serving as without it, bit for bit, and steps through it."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import pytest
import torch

import mezo
from tests.support.independent import check_against_algorithm_1
from tests.support.tiny import LINEARS, random_batch

pytestmark = pytest.mark.sglang

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=3)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


def served(engine):
    """Tokens and log-probabilities of prompts of several lengths, with and without a cached one."""
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 90) for _ in range(n)] for n in (1, 3, 17, 40)]
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    outputs = []
    for _ in range(2):
        answers = engine.generate(
            input_ids=prompts,
            sampling_params=params,
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=3,
        )
        for answer in answers:
            meta = answer["meta_info"]
            scores = meta["input_token_logprobs"], meta["output_top_logprobs"]
            outputs.append((answer["output_ids"], scores, meta["cached_tokens"]))
    return outputs


def test_serving_is_as_without_it_and_steps_equal_algorithm_1(model_dir, start_engine):
    without = served(start_engine(model_dir, CONFIG))
    engine = start_engine(model_dir, CONFIG, attention_backend="mezo")
    assert served(engine) == without
    rng = random.Random(1)
    with mezo.attach(engine, CONFIG) as run:
        batches = [random_batch(rng, kind=kind) for kind in ("completion", "classification")]
        check_against_algorithm_1(run, model_dir, batches)
        assert served(engine) == without  # also between the steps of a run


def test_what_is_written_to_it_reaches_the_engines_own():
    from mezo.engines.sglang.batch.attention import PairedAttention

    own = SimpleNamespace(kv_index_translator=None, forward=lambda *_: "own")
    backend = PairedAttention.around(own)
    backend.kv_index_translator = "the runner's"
    assert own.kv_index_translator == backend.kv_index_translator == "the runner's"
    assert backend.forward(torch.zeros(1), None, None, None, None) == "own"
    assert PairedAttention.around(backend) is backend
    del backend.kv_index_translator
    assert not hasattr(backend, "kv_index_translator")


@pytest.fixture
def attention(monkeypatch):
    from mezo.engines.sglang.batch import attention

    monkeypatch.delenv(attention._IS_NAMED, raising=False)
    yield attention
    os.environ.pop(attention._IS_NAMED, None)


@pytest.mark.parametrize(("is_cpu", "own"), [(True, "torch_native"), (False, None)])
def test_sglang_sees_its_own_choice(attention, monkeypatch, is_cpu, own):
    monkeypatch.setattr(attention, "is_cpu_host", lambda: is_cpu)
    arguments = SimpleNamespace(attention_backend="mezo")
    other = SimpleNamespace(attention_backend="triton")
    attention.resolve_name(other)
    assert other.attention_backend == "triton"
    assert attention._IS_NAMED not in os.environ
    for _ in range(2):
        attention.resolve_name(arguments)
        assert arguments.attention_backend == own
        assert os.environ[attention._IS_NAMED]


def test_backends_are_built_with_ours_in_front(attention, monkeypatch):
    from sglang.srt.layers.attention import attention_registry

    own = SimpleNamespace()
    backends = {"triton": lambda runner: own, "fa3": lambda runner: own}
    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", backends)
    attention.register_backend()
    assert backends["fa3"](None) is own
    monkeypatch.setenv(attention._IS_NAMED, "1")
    attention.register_backend()
    assert backends["fa3"](None).engines_own is own
    assert isinstance(backends["triton"](None), attention.PairedAttention)


@pytest.mark.parametrize("field", ["prefill_attention_backend", "decode_attention_backend"])
def test_half_of_it_is_refused(attention, field):
    with pytest.raises(ValueError, match="must be named as attention_backend"):
        attention.resolve_name(SimpleNamespace(attention_backend=None, **{field: "mezo"}))
