"""Rows of one's own train in SGLang as in transformers; activated prompts are computed once."""

from __future__ import annotations

import random

import pytest

import mezo
from tests.support.files import logged, valid_json
from tests.support.tiny import LINEARS, VOCAB, make_tokenizer

pytestmark = pytest.mark.sglang

RNG = random.Random(9)
ROWS = [
    {
        "text": " ".join(f"w{RNG.randrange(5, VOCAB)}" for _ in range(RNG.randint(3, 9))),
        "label": ("bad", "good")[i % 2],
    }
    for i in range(40)
]


@pytest.fixture(scope="module")
def engine(tiny_model_dir, start_engine):
    return start_engine(tiny_model_dir("llama"), mezo.MeZOConfig(rank=2, target_modules=LINEARS))


@pytest.mark.parametrize("prefix", ["exact", "activated"])
def test_a_training_is_that_of_transformers(prefix, engine, tiny_model_dir, tmp_path):
    losses = {}
    for name, model in (("sglang", engine), ("transformers", tiny_model_dir("llama"))):
        output = tmp_path / name
        summary = mezo.finetune(
            model,
            ROWS,
            tokenizer=make_tokenizer(),
            engine="transformers",  # of the path; the other one runs already
            output_dir=output,
            lora_target_modules="all-linear",
            lora_r=2,
            prefix=prefix,
            max_steps=16,  # two epochs
            batch_size=4,
            learning_rate=1e-4,
            eps=1e-2,
            seed=5,
        )
        losses[name] = [step.loss for step in logged(output)]
        record = valid_json((output / "summary.json").read_text())
        assert (record["completed"], record["problems"]) == (True, [])
        if name == "sglang":
            assert summary.steps == 16
            reused = [step.reused_tokens for step in logged(output)]
            computed = [step.prompt_tokens for step in logged(output)]
    assert losses["sglang"] == pytest.approx(losses["transformers"], rel=1e-4)
    if prefix == "activated":
        assert sum(computed[8:]) == 0  # the second epoch's prompts are all there
        assert min(reused[8:]) > 0
