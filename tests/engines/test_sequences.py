"""Rows share sequences: what then runs, and that losses stay the same."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import transformers

import mezo
from mezo import objectives
from mezo.core.rows import BASE, THETA, Rows, run_slots
from mezo.engines.sequences import ScoredToken, sequences_of
from mezo_kernels import Direction
from tests.support.independent import (
    activated_pair,
    activated_row_logprobs,
    check_activated_step,
    peft_model,
    perturbed,
    reference_loss,
    set_lora,
)
from tests.support.tiny import LINEARS, VOCAB, load_model, random_batch

CONFIG = mezo.MeZOConfig(rank=4, alpha=8, target_modules=LINEARS, lr=1e-3, eps=1e-2, seed=3)
INVOCATION = (77, 8)
MODES = [
    ("exact", None),
    ("exact", INVOCATION),
    ("activated", INVOCATION),
    ("detached", None),
    ("detached", INVOCATION),
]

# Prompts that come twice, one that begins another, and one of a single token.
PROMPTS = [[1, 30, 31, 32], [1, 40], [1, 30, 31, 32], [1, 30], [9], [1, 40]]
OPTIONS = [
    [[5], [6]],
    [[7], [8, 9], [10]],
    [[6], [20], [21], [5]],
    [[31, 32], [5], [33, 34, 35]],
    [[5], [6], [7]],
    [[8, 9], [8, 10]],
]
BATCHES = {
    "options": mezo.Batch(prompts=PROMPTS, options=OPTIONS, labels=[1, 0, 3, 2, 1, 0]),
    "shared options": mezo.Batch(prompts=PROMPTS, options=[[5], [6]], labels=[0, 1, 1, 0, 1, 0]),
    "completions": mezo.Batch(prompts=PROMPTS, completions=[[5], [6, 7], [5], [8], [9, 9, 9], [4]]),
}


def plain_sums(prefix_model, model, batch, config) -> list[float]:
    """A row an option, each on its own and without padding, from the definition of the mode."""
    invocation = list(config.invocation or ())
    sums = []
    for prompt, completion in batch.pairs():
        cut = len(prompt) if invocation else len(prompt) - 1
        prefix = [] if config.prefix == "exact" else prompt[:cut]
        rest = [*prompt, *invocation, *completion][len(prefix) :]
        values = activated_row_logprobs(prefix_model, model, prefix, rest, len(completion))
        sums.append(values.double().sum().item())
    return sums


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("prefix", "invocation"), MODES, ids=str)
def test_losses_are_those_of_a_row_an_option(tiny_model_dir, prefix, invocation, batch):
    model_dir = tiny_model_dir("llama")
    config = dataclasses.replace(CONFIG, prefix=prefix, invocation=invocation)
    prefix_model, model = load_model(model_dir), peft_model(model_dir, config)
    with mezo.attach(load_model(model_dir), config) as run:
        run.apply_update([0.1])  # away from B = 0
        weights = run.weights()
        if prefix == "detached":
            prefix_model = peft_model(model_dir, config)
            set_lora(prefix_model, weights)
        state, encoded = run.session.state, run.encode(batch)
        state.perturb(run.steps, config.eps)
        scores = run.session._score(encoded.rows, run_slots(1))
        for slot, scale in (("plus0", config.eps), ("minus0", -config.eps), (THETA, 0.0)):
            set_lora(model, perturbed(weights, Direction(config.seed, run.steps), scale))
            expected = plain_sums(prefix_model, model, batch, config)
            ours = scores.logprob_sums[slot]
            assert ours == pytest.approx(expected, rel=0, abs=1e-5)
            objective = objectives.of(encoded.targets)
            loss = objective.loss(encoded.targets, expected)
            assert objective.loss(encoded.targets, ours) == pytest.approx(loss, rel=1e-6, abs=0)


@pytest.mark.parametrize("prefix", ["exact", "activated", "detached"])
def test_a_prompt_with_one_token_options_is_one_row_of_the_forward(tiny_model_dir, prefix):
    model = load_model(tiny_model_dir("qwen2"))
    seen, read = [], []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, args, out: read.append(out.shape[:-1].numel()))
    config = dataclasses.replace(CONFIG, prefix=prefix, invocation=INVOCATION)
    with mezo.attach(model, config, selftest=False) as run:
        result = run.step(BATCHES["shared options"])
        # 4 distinct prompts of up to 4 tokens, and the invocation.
        assert seen == [(4, 6)] * 2
        assert read == [4, 4]
        assert (result.tokens, result.forwards) == (2 * 4 * 6, 2)
        seen.clear()
        run.evaluate(BATCHES["options"])
        # 4 prompts, and behind two of them 5 options of 2 or 3 tokens without their last one, of
        # which 3 are then equal.
        assert seen == [(4 + 3, 6)]


def test_sequences_and_what_is_read_off_them():
    rows = Rows(
        tokens=[[1, 2, 7], [1, 2, 8], [1, 2, 8, 9], [1, 2, 7], [1, 2, 9], [1, 2, 8, 5], [1, 2, 8]],
        prefix_lens=[1, 1, 1, 1, 0, 1, 1],
        prompt_lens=[2, 2, 2, 2, 2, 2, 1],
        is_normalised=[False, True, True, True, True, True, True],
    )
    prompt, longer, undivided, earlier = sequences_of(rows)
    assert (prompt.tokens, prompt.prefix_len, prompt.prompt) == ((1, 2), 1, (1, 2))
    assert prompt.scored_tokens == [
        ScoredToken(1, 7, 0, False),
        ScoredToken(1, 8, 1, True),
        ScoredToken(1, 7, 3, True),
    ]
    assert (longer.tokens, longer.prefix_len, longer.prompt) == ((1, 2, 8), 1, (1, 2))
    assert longer.scored_tokens == [
        ScoredToken(1, 8, 2, True),
        ScoredToken(2, 9, 2, True),
        ScoredToken(1, 8, 5, True),
        ScoredToken(2, 5, 5, True),
    ]
    assert (undivided.tokens, undivided.prefix_len) == ((1, 2), 0)
    assert (earlier.tokens, earlier.prompt) == ((1, 2), (1,))
    assert earlier.scored_tokens == [ScoredToken(0, 2, 6, True), ScoredToken(1, 8, 6, True)]


def test_a_prompt_that_is_all_prefix(tiny_model_dir):
    model_dir = tiny_model_dir("llama")
    rows = Rows([[1, 5, 6, 7], [1, 5, 6, 8]], [3, 3], [3, 3], [True, True])
    with mezo.attach(load_model(model_dir), CONFIG) as run:
        run.apply_update([0.1])
        base = run.session.score(rows, BASE).logprob_sums[BASE]
        activated = run.session.score(rows, THETA).logprob_sums[THETA]
        detached = dataclasses.replace(rows, prefix_adapter=THETA)
        theta = run.session.score(detached, THETA).logprob_sums[THETA]
        exact = run.session.score(dataclasses.replace(rows, prefix_lens=[0, 0]), THETA)
    assert activated == base
    assert theta == exact.logprob_sums[THETA] != base


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def tiny_gemma2():
    kv = {"num_key_value_heads": 1, "head_dim": 16}
    config = transformers.Gemma2Config(**SIZES, **kv, final_logit_softcapping=3.0)
    return transformers.Gemma2ForCausalLM(config)


def tiny_cohere():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.3))


class Projection(torch.nn.Module):
    """An lm_head of a kind that the engine does not know."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


def tiny_with_another_head():
    model = tiny_cohere()
    model.lm_head = Projection(model.lm_head)
    return model


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_cohere, tiny_with_another_head])
def test_what_a_model_does_to_its_logits_is_done(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        expected = {name: reference_loss(model, batch).item() for name, batch in BATCHES.items()}
    with mezo.attach(model, CONFIG) as run:
        for name, batch in BATCHES.items():
            assert run.evaluate(batch, base=True).loss == pytest.approx(expected[name], rel=1e-6)


def test_an_adapted_lm_head(tiny_model_dir):
    model_dir = tiny_model_dir("llama")
    config = dataclasses.replace(
        CONFIG, target_modules=("q_proj", "lm_head"), prefix="activated", invocation=INVOCATION
    )
    pair = activated_pair(model_dir, config)
    rng = random.Random(7)
    with mezo.attach(load_model(model_dir), config) as run:
        for kind in ("completion", "classification") * 2:
            check_activated_step(run, pair, random_batch(rng, kind=kind))
