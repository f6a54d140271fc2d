"""`attention_backend="mezo"`: serving as without it, bit for bit, and steps through it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from independent import check_against_algorithm_1
from tiny import LINEARS, random_batch

import mezo

pytestmark = pytest.mark.sglang

CONFIG = mezo.MezoConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=3)


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
    from mezo.sglang.attention import PairedAttention

    own = SimpleNamespace(kv_index_translator=None, forward=lambda *_: "own")
    backend = PairedAttention.around(own)
    backend.kv_index_translator = "the runner's"
    assert own.kv_index_translator == backend.kv_index_translator == "the runner's"
    assert backend.forward(torch.zeros(1), None, None, None, None) == "own"
    assert PairedAttention.around(backend) is backend
    del backend.kv_index_translator
    assert not hasattr(backend, "kv_index_translator")


def test_on_a_gpu_it_wraps_what_sglang_would_choose(model_dir):
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    from mezo.sglang import compat

    arguments = ServerArgs(model_path=model_dir, device="cpu", attention_backend="mezo")
    runner = SimpleNamespace(
        device="cuda",
        use_mla_backend=False,
        server_args=arguments,
        model_config=ModelConfig.from_server_args(arguments),
    )
    assert compat.default_attention_backend(runner) in ("triton", "flashinfer")
    runner.device = "cpu"
    assert compat.default_attention_backend(runner) == "torch_native"


def test_mla_is_refused():
    from mezo.sglang import attention

    with pytest.raises(ValueError, match="got one with MLA"):
        attention._create(SimpleNamespace(use_mla_backend=True))
