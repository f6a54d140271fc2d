"""What a run continues prompts with, and weights put into one: against PEFT and greedy search."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import mezo
from tests.support.independent import load_peft
from tests.support.tiny import LINEARS, load_model, make_tokenizer, random_batch

INVOCATION = " w77 w8"
EXACT = mezo.MeZOConfig(
    rank=4, alpha=8, target_modules=LINEARS, lr=1e-2, seed=12, invocation=INVOCATION
)
ACTIVATED = dataclasses.replace(EXACT, prefix="activated")
PROMPTS = ["w20 w31 w42", "w9", "w77 w8 w50 w51 w52 w53"]
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


def attached(model_dir, config=EXACT):
    return mezo.attach(load_model(model_dir), config, tokenizer=TOKENIZER, selftest=False)


def train(run, steps=6):
    rng = random.Random(4)
    for _ in range(steps):
        run.step(random_batch(rng), lr=0.1)


def greedy(model, prompt: str, num_tokens: int) -> list[int]:
    """The likeliest tokens, each from a forward of all that is before it; no keys are kept."""
    ids = TOKENIZER(prompt + INVOCATION, add_special_tokens=False)["input_ids"]
    made = []
    with torch.no_grad():
        while len(made) < num_tokens and (not made or made[-1] != TOKENIZER.eos_token_id):
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


@pytest.mark.parametrize("config", [EXACT, ACTIVATED], ids=["exact", "activated"])
def test_continuations_are_pefts_of_the_saved_adapter(model_dir, tmp_path, config):
    with attached(model_dir, config) as run:
        train(run)
        ours = run.generate(PROMPTS, max_new_tokens=12)
        base = run.generate(PROMPTS, max_new_tokens=12, base=True)
        run.save(tmp_path)
    model = load_peft(model_dir, tmp_path)
    for prompt, text, plain in zip(PROMPTS, ours, base, strict=True):
        ids = torch.tensor([TOKENIZER(prompt + INVOCATION, add_special_tokens=False)["input_ids"]])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        theirs = made[0, ids.shape[1] :]
        assert text == TOKENIZER.decode(theirs, skip_special_tokens=True)
        expected = greedy(load_model(model_dir), prompt, 12)
        assert plain == TOKENIZER.decode(expected, skip_special_tokens=True)
    assert ours != base


def test_prompts_may_be_token_ids(model_dir):
    with attached(model_dir) as run:
        train(run)
        ids = TOKENIZER(PROMPTS, add_special_tokens=False)["input_ids"]
        assert run.generate(ids, max_new_tokens=4) == run.generate(PROMPTS, max_new_tokens=4)


def test_what_a_model_says_about_sampling_does_not_count(model_dir):
    with attached(model_dir) as run:
        plain = run.generate(PROMPTS, max_new_tokens=8)
        settings = run.session.model.generation_config
        settings.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0)
        assert run.generate(PROMPTS, max_new_tokens=8) == plain


def test_an_end_token_ends_a_continuation_and_is_left_out(model_dir):
    with attached(model_dir) as run:
        first, second, *_ = run.generate(PROMPTS[:1], max_new_tokens=4)[0].split()
        run.session.model.generation_config.eos_token_id = int(second[1:])
        made = run.session.generate(
            [TOKENIZER(PROMPTS[0] + INVOCATION, add_special_tokens=False)["input_ids"]],
            [0],
            "theta",
            max_new_tokens=4,
            temperature=0.0,
            stop=[],
        )
        assert made == [[int(first[1:]), int(second[1:])]]


def test_a_stop_text_ends_a_continuation_and_is_cut_off(model_dir):
    with attached(model_dir) as run:
        words = run.generate(PROMPTS[:1], max_new_tokens=6)[0].split()
        for stop in ([words[2]], words[2], ("never", words[4], words[2])):
            text = run.generate(PROMPTS[:1], max_new_tokens=6, stop=stop)[0]
            assert text.split() == words[:2]


def test_a_temperature_draws(model_dir):
    with attached(model_dir) as run:
        torch.manual_seed(0)
        drawn = {run.generate(PROMPTS[:1], max_new_tokens=6, temperature=3.0)[0] for _ in range(5)}
        assert len(drawn) > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompts": "w5"}, "prompts must be a list with an entry for each .* got one text"),
        ({"prompts": []}, "prompts must hold at least one prompt, got none"),
        ({"prompts": [3.5]}, r"prompts\[0\] must be text or a list of token ids, got 3.5"),
        ({"max_new_tokens": 0}, "generate: max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": 300}, "row 0 must have at most 256 tokens .* got 303"),
        ({"temperature": -1}, "generate: temperature must be a finite number >= 0, got -1"),
        ({"stop": [3]}, r"generate: stop must be a list of texts, got \[3\]"),
        ({"stop": [""]}, r"generate: stop must be a list of texts, got \[''\]"),
    ],
)
def test_bad_arguments_are_named(model_dir, arguments, sentence):
    with attached(model_dir) as run, pytest.raises(ValueError, match=sentence):
        run.generate(**{"prompts": ["w5"], **arguments})


def test_a_tokenizer_is_asked_for(model_dir):
    config = dataclasses.replace(EXACT, invocation=None)
    with (
        mezo.attach(load_model(model_dir), config, selftest=False) as run,
        pytest.raises(ValueError, match=r"there must be a tokenizer .* attach with tokenizer="),
    ):
        run.generate([[5]])


def test_weights_of_one_run_are_those_of_another(model_dir):
    batch = random_batch(random.Random(5))
    with attached(model_dir) as run:
        train(run)
        weights, scores = run.weights(), run.evaluate(batch)
        further = [run.step(batch).losses for _ in range(2)]
    with attached(model_dir, dataclasses.replace(EXACT, seed=12)) as other:
        train(other, steps=5)
        other.step(batch)  # an update is kept back
        other.set_weights(weights)
        assert all(torch.equal(weights[name], value) for name, value in other.weights().items())
        assert other.evaluate(batch).predictions == scores.predictions
        assert other.evaluate(batch).loss == scores.loss
        assert [other.step(batch).losses for _ in range(2)] == further


def test_weights_that_are_not_the_runs_are_refused_and_change_nothing(model_dir):
    with attached(model_dir) as run:
        before = run.weights()
        name = next(iter(before))
        others = {f"other.{n}": v for n, v in before.items()}
        infinite = before[name].clone()
        infinite[0, 0] = float("inf")
        for weights, sentence in (
            (others, r"set_weights: weights must be those of the 28 tensors .*unknown: \['other"),
            ({n: v for n, v in before.items() if n != name}, r"got 27 .*missing: \['model\."),
            ({**before, name: before[name][:2]}, r"of shape \(4, 64\), got the shape \(2, 64\)"),
            ({**before, name: infinite}, "must be finite in fp32 .* got values that are not"),
        ):
            with pytest.raises(ValueError, match=sentence):
                run.set_weights(weights)
        assert all(torch.equal(before[n], value) for n, value in run.weights().items())
