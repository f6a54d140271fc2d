"""Activated adapters in SGLang's own serving: equal to PEFT, cold and warm, beside the others."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mezo
from mezo.data.encode import last_occurrence
from tests.support.independent import (
    activated_row_logprobs,
    load_peft,
    lora_parameters,
    row_logprobs,
)
from tests.support.tiny import LINEARS, load_model, random_batch
from tests.support.tokenizer_cases import make

pytestmark = pytest.mark.sglang

MISSING = "mezo_invocation_missing"
OURS, THEIRS = (77, 8, 200), (300, 301)
CONFIG = mezo.MeZOConfig(
    rank=4,
    alpha=8,
    target_modules=LINEARS,
    lr=2e-3,
    seed=3,
    prefix="activated",
    invocation=OURS,
    name="trained",
)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model, with a tokenizer that puts bos and a blank before every text."""
    directory = tmp_path_factory.mktemp("spaced") / "llama"
    shutil.copytree(tiny_model_dir("llama"), directory)
    make("first", "bos").save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def engine_log(tmp_path_factory):
    """Where the engine's processes write their warnings."""
    directory = tmp_path_factory.mktemp("log")
    path = directory / "engine.log"
    handler = {"class": "logging.FileHandler", "filename": str(path), "level": "WARNING"}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"file": handler},
        "root": {"handlers": ["file"], "level": "WARNING"},
    }
    (directory / "logging.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_LOGGING_CONFIG_PATH", str(directory / "logging.json"))
        yield path


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """Directories of an activated and an ordinary PEFT adapter that others have made."""
    made = {}
    for name, tokens in (("foreign", list(THEIRS)), ("ordinary", None)):
        lora = LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
            alora_invocation_tokens=tokens,
        )
        model = get_peft_model(load_model(model_dir), lora)
        generator = torch.Generator().manual_seed(len(made))
        for parameter in lora_parameters(model).values():
            parameter.data.normal_(0, 0.1, generator=generator)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(str(made[name]))
    return made


@pytest.fixture(scope="module")
def engine(model_dir, adapters, start_engine, engine_log):
    engine = start_engine(model_dir, CONFIG, max_loras_per_batch=9, max_total_tokens=2048)
    from mezo.engines.sglang.eras import ERA

    if not ERA.serves_activated:
        pytest.skip("this SGLang's requests cannot stay out of the radix cache")
    for name, directory in adapters.items():
        assert engine.load_lora_adapter(name, str(directory)).success
    return engine


@pytest.fixture(scope="module")
def run(engine):
    rng = random.Random(0)
    with mezo.attach(engine, CONFIG) as run:
        for _ in range(20):
            run.step(random_batch(rng))
        yield run


def generate(engine, prompts, names, **logprobs):
    outputs = engine.generate(
        input_ids=prompts,
        lora_path=names,
        sampling_params={"temperature": 0, "max_new_tokens": 5, "ignore_eos": True},
        return_logprob=True,
        **logprobs,
    )
    return [(o["output_ids"], o["meta_info"]) for o in outputs]


def output_logprobs(meta):
    return torch.tensor([t[0] for t in meta["output_token_logprobs"]])


def prompt_of(rng, invocation, size=12):
    """Random tokens, the invocation among them twice, and some more behind it."""
    words = [rng.randrange(3, 76) for _ in range(size)]
    return [1, *words[:4], *invocation, *words[4:], *invocation, *words[:2]]


def as_ordinary(directory, target):
    """A copy of an activated adapter that acts on every token it is given."""
    shutil.copytree(directory, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alora_invocation_tokens": None}))
    return target


@torch.no_grad()
def test_base_ordinary_and_activated_in_one_batch_equal_peft(
    engine, run, model_dir, adapters, tmp_path
):
    rng = random.Random(1)
    invocations = {"foreign": THEIRS, "trained": OURS}
    directories = {**adapters, "trained": run.save(tmp_path / "trained")}
    models = {name: load_peft(model_dir, d) for name, d in directories.items()}
    models[None] = load_model(model_dir)
    on_all_tokens = {
        name: load_peft(model_dir, as_ordinary(directories[name], tmp_path / f"{name}_all"))
        for name in invocations
    }
    names = [None, "ordinary", "foreign", "trained", "trained"]
    prompts = [prompt_of(rng, invocations.get(name, OURS)) for name in names]
    engine.flush_cache()
    for is_warm in (False, True):
        answers = generate(engine, prompts, names)
        for name, prompt, (tokens, meta) in zip(names, prompts, answers, strict=True):
            row = [*prompt, *tokens]
            if name in invocations:
                start = last_occurrence(prompt, invocations[name])
                expected = activated_row_logprobs(
                    models[None], on_all_tokens[name], prompt[:start], row[start:], len(tokens)
                )
                # PEFT finds the invocation itself.
                theirs = models[name].generate(
                    input_ids=torch.tensor([prompt]),
                    max_new_tokens=len(tokens),
                    min_new_tokens=len(tokens),
                    do_sample=False,
                    pad_token_id=0,
                )
                assert tokens == theirs[0, len(prompt) :].tolist()
                assert meta["cached_tokens"] == start  # also when cold: computed just before
            else:
                expected = row_logprobs(models[name], row, len(prompt))
                assert meta["cached_tokens"] == (len(prompt) - 1 if is_warm else 0)
            torch.testing.assert_close(output_logprobs(meta), expected, atol=1e-5, rtol=0)
    free = run.session.free_memory()
    assert free["protected_tokens"] == 0
    assert free["kv_tokens"] + free["evictable_tokens"] == 2048


def test_the_prefix_is_the_base_models_for_everybody(engine, run):
    rng = random.Random(2)
    prompt = prompt_of(rng, OURS, size=30)
    start = last_occurrence(prompt, OURS)
    engine.flush_cache()
    ((_, meta),) = generate(engine, [prompt[: start + 1]], [None])
    assert meta["cached_tokens"] == 0
    ((first, meta),) = generate(engine, [prompt], ["trained"])
    assert meta["cached_tokens"] == start  # a base request had computed it
    held = run.session.free_memory()
    assert generate(engine, [prompt], ["trained"])[0][0] == first
    assert run.session.free_memory() == held  # nothing of the adapter's own has been kept
    # Training on the same prompt finds it too.
    batch = mezo.Batch(prompts=[prompt[:start]], completions=[[5, 6]])
    assert run.pair_losses(batch).prompt_tokens == 0


def test_requests_follow_training(engine, run):
    rng = random.Random(3)
    prompt = prompt_of(rng, OURS)
    seen = []
    for _ in range(3):
        ((_, meta),) = generate(engine, [prompt], ["trained"])
        seen.append(output_logprobs(meta))
        run.step(random_batch(rng))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_prompt_without_the_invocation_is_the_base_models(engine, run):
    prompt = [1, 50, 51, 52, *OURS[:2], 53]
    ((base, meta),) = generate(engine, [prompt], [None])
    ((adapted, other),) = generate(engine, [prompt], ["trained"])
    assert adapted == base
    torch.testing.assert_close(output_logprobs(other), output_logprobs(meta), atol=1e-5, rtol=0)


def test_a_missing_invocation_is_said(engine, run, engine_log):
    missing, found = [1, 50, 51, 52, *OURS[:2], 53], [1, 50, *OURS, 53]
    foreign = [1, 60, *THEIRS[:1]]
    answers = generate(
        engine,
        [missing, found, missing, missing, foreign],
        ["trained", "trained", None, "ordinary", "foreign"],
    )
    assert [meta.get(MISSING) for _, meta in answers] == [1, None, None, None, 1]
    assert MISSING not in generate(engine, [found], ["trained"])[0][1]
    chunks = list(
        engine.generate(
            input_ids=missing,
            lora_path="trained",
            sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
            stream=True,
        )
    )
    assert len(chunks) > 1
    assert [chunk["meta_info"][MISSING] for chunk in chunks] == [1] * len(chunks)
    warnings = [line for line in engine_log.read_text().splitlines() if MISSING in line]
    for name, tokens in (("trained", OURS), ("foreign", THEIRS)):
        (line,) = [line for line in warnings if f"adapter '{name}'" in line]
        assert str(list(tokens)) in line
        assert "the base model answers it" in line
    assert len(warnings) == 2


def test_text_that_was_trained_is_found_when_it_is_served(engine, run):
    prompt, invocation = "A fine film.", "#Answer:"
    config = dataclasses.replace(CONFIG, name="text", invocation=invocation, lr=0.1)
    with mezo.attach(engine, config) as text_run:
        batch = mezo.Batch(prompts=[prompt], options=[" yes", " no"], labels=[0])
        for _ in range(5):
            text_run.step(batch)
        output = engine.generate(
            prompt=prompt + invocation,
            lora_path="text",
            sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
            return_logprob=True,
        )
        meta = output["meta_info"]
        assert MISSING not in meta
        served = make("first", "bos")(prompt + invocation)["input_ids"]
        start = last_occurrence(served, text_run.invocation.tokens)
        assert meta["prompt_tokens"] == len(served)
        assert meta["cached_tokens"] == start
        logprob, token = meta["output_token_logprobs"][0][:2]
        row = mezo.Batch(prompts=[prompt], completions=[[token]])
        assert text_run.evaluate(row).loss == pytest.approx(-logprob, abs=1e-5)
        assert abs(text_run.evaluate(row, base=True).loss + logprob) > 1e-3


def test_log_likelihoods_begin_behind_the_prefix(engine, run):
    prompt = prompt_of(random.Random(4), OURS)
    start = last_occurrence(prompt, OURS)
    ((_, meta),) = generate(engine, [prompt], ["trained"], logprob_start_len=0)
    scored = [t[0] for t in meta["input_token_logprobs"]]
    assert len(scored) == len(prompt) - start
    loss = run.evaluate(
        mezo.Batch(prompts=[prompt[:start]], completions=[prompt[start + len(OURS) :]])
    ).loss
    tail = scored[len(OURS) :]
    assert -sum(tail) / len(tail) == pytest.approx(loss, abs=1e-5)


def test_an_invocation_at_the_beginning(engine, run):
    ((_, meta),) = generate(engine, [[*OURS, 40, 41]], ["trained"])
    assert meta["cached_tokens"] == 0
    loss = run.evaluate(mezo.Batch(prompts=[[]], completions=[[40, 41]])).loss
    ((_, meta),) = generate(engine, [[*OURS, 40, 41]], ["trained"], logprob_start_len=0)
    scored = [t[0] for t in meta["input_token_logprobs"]][-2:]
    assert -sum(scored) / 2 == pytest.approx(loss, abs=1e-5)


def test_last_occurrence():
    assert last_occurrence([1, 2, 1, 2, 3], [1, 2]) == 2
    assert last_occurrence([1, 2], [1, 2, 3]) is None
    assert last_occurrence([5, 6, 7], [6, 8]) is None
