"""Pages of several tokens: prompts that end inside a page, in every prefix mode."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import mezo
from tests.support.independent import activated_pair, check_activated_step, step_both
from tests.support.tiny import LINEARS, VOCAB, load_model, random_batch, raw_request

pytestmark = pytest.mark.sglang

PAGE = 16
CONFIG = mezo.MeZOConfig(
    rank=4,
    alpha=8,
    target_modules=LINEARS,
    lr=1e-3,
    eps=1e-2,
    seed=31,
    prefix="activated",
    invocation=(77, 8, 200),
)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def engine(model_dir, start_engine):
    engine = start_engine(model_dir, CONFIG, page_size=PAGE, max_total_tokens=4096)
    from mezo.engines.sglang.eras import ERA

    if not ERA.serves_activated and not torch.cuda.is_available():
        pytest.skip("this SGLang's allocator of pages is a Triton kernel, which needs a GPU")
    return engine


@pytest.fixture
def run(engine):
    engine.flush_cache()
    with mezo.attach(engine, CONFIG) as run:
        yield run


def prompts_of(rng, *lengths):
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def test_activated_steps_equal_base_keys_and_values_with_peft(run, model_dir):
    rng = random.Random(0)
    pair = activated_pair(model_dir, CONFIG)
    for kind in ("completion", "classification") * 2:
        check_activated_step(run, pair, random_batch(rng, kind=kind))
    # Whole pages, one token more and less, none at all, and a prompt that begins another.
    prompts = prompts_of(rng, PAGE, PAGE + 1, 2 * PAGE - 1, 3 * PAGE, 0)
    prompts += [prompts[3][: PAGE + 5], [*prompts[3], 9]]
    # One completion leaves the row's first page, which holds the end of the prompt.
    completions = [[5], [6, 7], [8, 9], [10] * 20, [11], [12], [13, 14]]
    batch = mezo.Batch(prompts=prompts, completions=completions)
    tokens = sum(map(len, prompts))
    result = check_activated_step(run, pair, batch)
    assert result.prompt_tokens == tokens  # found missing together, computed together
    for _ in range(3):
        again = check_activated_step(run, pair, batch)
        assert again.prompt_tokens == 0
        assert again.reused_tokens == 2 * tokens


def test_base_requests_share_whole_pages(run, engine):
    rng = random.Random(1)
    (prompt,) = prompts_of(rng, 2 * PAGE + 5)
    run.step(mezo.Batch(prompts=[prompt], completions=[[5, 6]]))
    output = engine.generate(
        input_ids=[prompt], sampling_params={"temperature": 0, "max_new_tokens": 2}
    )[0]
    assert output["meta_info"]["cached_tokens"] == 2 * PAGE


@pytest.mark.parametrize("prefix", ["exact", "detached"])
def test_other_modes_agree_with_transformers(engine, model_dir, prefix):
    config = dataclasses.replace(CONFIG, prefix=prefix, name=prefix)
    rng = random.Random(2)
    with (
        mezo.attach(engine, config) as run,
        mezo.attach(load_model(model_dir), config) as truth,
    ):
        free = run.session.free_memory()
        for number in range(8):
            batch = random_batch(rng, kind=("completion", "classification")[number % 2])
            step_both(run, truth, batch)
        assert run.session.free_memory() == free


def test_eviction_and_balance(run, engine, model_dir):
    rng = random.Random(3)
    pair = activated_pair(model_dir, CONFIG)
    total = run.session.free_memory()["kv_tokens"]
    batch = mezo.Batch(prompts=prompts_of(rng, 30, 41), completions=[[5, 6], [7]])
    for _ in range(3):
        check_activated_step(run, pair, batch)
        for _ in range(12):  # more prompts than the pool has room for
            long = mezo.Batch(prompts=prompts_of(rng, 201, 230), completions=[[5, 6], [7]])
            run.step(long)
        memory = run.session.free_memory()
        assert memory["protected_tokens"] == 0
        assert memory["kv_tokens"] + memory["evictable_tokens"] == total
    assert check_activated_step(run, pair, batch).prompt_tokens == 71
    # A failing forward, in the suffix and in the prompt.
    for tokens in ([1, 5, 10**6, 7, 8], [1, 10**6, 5, 7, 8]):
        with pytest.raises(RuntimeError, match="index out of range"):
            run.session.step(raw_request(run.steps, tokens, prefix_len=2))
        memory = run.session.free_memory()
        assert memory["protected_tokens"] == 0
        assert memory["kv_tokens"] + memory["evictable_tokens"] == total
    assert run.step(batch).status is mezo.StepStatus.OK
    assert engine.flush_cache()


def test_serving_says_that_it_wants_pages_of_one_token(engine, caplog):
    with mezo.attach(engine, CONFIG) as run:
        assert "must have pages of one token, got page_size 16" in caplog.text
        assert run.step(random_batch(random.Random(4))).status is mezo.StepStatus.OK
