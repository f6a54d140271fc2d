"""From a file of rows to an adapter that others load: train, eval, generate, export, plot."""

from __future__ import annotations

import json
import random

import pytest
import torch
from typer.testing import CliRunner

import mezo
from mezo.cli import app
from mezo.train.saved_run import open_run, worded
from tests.mezo.data.test_own import TEMPLATE
from tests.support.files import valid_json, write_jsonl
from tests.support.independent import load_peft, row_logprobs
from tests.support.tiny import VOCAB, make_tokenizer

RNG = random.Random(5)
TEXTS = [" ".join(f"w{RNG.randrange(5, VOCAB)}" for _ in range(4)) for _ in range(40)]
CHATS = [
    [{"role": "user", "content": t}, {"role": "assistant", "content": f"w{5 + i % 3}"}]
    for i, t in enumerate(TEXTS)
]
SHAPES = {
    "label": [{"text": t, "label": ("bad", "good")[i % 2]} for i, t in enumerate(TEXTS)],
    "completion": [{"prompt": t, "completion": f" w{5 + i % 3}"} for i, t in enumerate(TEXTS)],
    "messages": [{"messages": chat} for chat in CHATS],
    "chat": [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS],
    "text": [{"text": t} for t in TEXTS],
    "alpaca": [
        {"instruction": t, "input": "w9", "output": f"w{5 + i % 3}"} for i, t in enumerate(TEXTS)
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": chat[0]["content"]},
                {"from": "gpt", "value": chat[1]["content"]},
            ]
        }
        for chat in CHATS
    ],
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The tiny model with a chat template."""
    from tests.support.tiny import save_tiny_model

    directory = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", str(directory))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(directory))
    return str(directory)


def command(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def train(model_dir, data, output, *more):
    return command(
        *("train", "--model", model_dir, "--data", data, "--output_dir", output),
        *("--engine", "transformers", "--max_steps", 5, "--per_device_train_batch_size", 4),
        *("--learning_rate", 1e-2, "--lora_r", 2, *more),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_of_rows_becomes_an_adapter_that_peft_loads(shape, model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES[shape])
    output, exported = tmp_path / "out", tmp_path / "peft"
    more = ["--assistant_only_loss"] if shape in ("messages", "sharegpt") else []
    train(model_dir, data, output, *more)
    after = valid_json((output / "summary.json").read_text())["held_out"]["after"]
    table = command("eval", output)
    result = valid_json((output / "eval_results.json").read_text())
    assert result["adapter"]["loss"] == after["cross_entropy"]
    assert result["base"]["loss"] != result["adapter"]["loss"]
    assert result["adapter"].get("accuracy") == after["accuracy"]
    assert f"{after['cross_entropy']:10.4f}" in table
    assert f"({after['num_examples']} examples)" in table
    command("export", output, "--output", exported)
    peft = load_peft(model_dir, exported)
    with open_run(output) as run, torch.inference_mode():
        ids = [[1, *range(20, 30)]]
        logits = peft(torch.tensor(ids)).logits
        batch = mezo.Batch(prompts=[ids[0][:4]], completions=[ids[0][4:]])
        tokens = run.encode(batch).rows.tokens[0]
        expected = peft(torch.tensor([tokens])).logits[0].log_softmax(-1)
        size = len(tokens) - 7
        places = torch.arange(size - 1, len(tokens) - 1)
        sums = -expected[places, torch.tensor(tokens[size:])].mean().item()
        assert run.evaluate(batch).loss == pytest.approx(sums, abs=1e-5)
        assert logits.isfinite().all()


def test_other_rows_are_worded_as_the_training_s(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES["label"])
    other = write_jsonl(tmp_path / "other.jsonl", SHAPES["label"][1:2])
    train(model_dir, data, tmp_path / "out")
    table = command("eval", tmp_path / "out", "--data", other, "--metric", "f1")
    assert "(1 examples)" in table  # one label only: names come from the training
    result = valid_json((tmp_path / "out" / "eval_results.json").read_text())
    assert set(result["adapter"]) == {"loss", "accuracy", "f1"}


def test_metrics_of_texts_generate(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES["completion"])
    train(model_dir, data, tmp_path / "out")
    command("eval", tmp_path / "out", "--metric", "token_f1", "--max_eval_samples", 4)
    result = valid_json((tmp_path / "out" / "eval_results.json").read_text())
    assert set(result["adapter"]) == {"loss", "perplexity", "f1", "exact_match"}
    answers = command("generate", tmp_path / "out", "--prompt", TEXTS[0], "--max_new_tokens", 3)
    assert answers.strip()


def test_metrics_of_texts_need_answers(model_dir, tmp_path):
    train(model_dir, write_jsonl(tmp_path / "rows.jsonl", SHAPES["text"]), tmp_path / "out")
    words = f"eval {tmp_path / 'out'} --metric exact_match"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert "metric 'exact_match' must come with right answers" in result.output


@pytest.mark.parametrize("prefix", ["exact", "activated"])
def test_prefixes_of_own_data(prefix, model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES["chat"])
    train(model_dir, data, tmp_path / "out", "--prefix", prefix)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    expected = [1, 0] if prefix == "activated" else None  # <s> assistant
    assert config.get("alora_invocation_tokens") == expected
    command("eval", tmp_path / "out")


def test_an_activated_adapter_needs_a_place_to_begin(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES["completion"])
    words = f"train --model {model_dir} --data {data} --output {tmp_path} --prefix activated"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert "invocation must be a non-empty text or token ids" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval {0}", "must be a file, got none; pass the output directory of a training"),
        ("eval {1} --metric bleu", "eval: metric must be one of: accuracy, .* got 'bleu'"),
        ("eval {1} --data nowhere.csv", "nowhere.csv must be a file, a folder or a hub name"),
        ("eval {1} --engine vllm", "engine must be one of: .* got 'vllm'"),
    ],
)
def test_bad_calls_of_eval(words, message, model_dir, tmp_path):
    import re

    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES["label"])
    output = tmp_path / "out"
    if "{1}" in words:
        train(model_dir, data, output)
    result = CliRunner().invoke(app, words.format(tmp_path / "none", output).split())
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.split()))


def test_rows_in_memory_cannot_be_found_again(model_dir, tmp_path):
    options = {"engine": "transformers", "max_steps": 1, "batch_size": 4}
    mezo.finetune(model_dir, SHAPES["label"], output_dir=tmp_path / "out", **options)
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "the training's was in memory; pass data" in result.output
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES["label"])
    more = {"eval_data": SHAPES["label"], "output_dir": tmp_path / "other"}
    mezo.finetune(model_dir, str(data), **more, **options)
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "the training's eval_data was in memory; pass data" in " ".join(result.output.split())


def test_an_adapter_that_was_trained_to_choose_says_what_it_chooses(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES["label"])
    output = tmp_path / "out"
    train(model_dir, data, output)
    options = valid_json((output / "summary.json").read_text())["options"]
    prompts = ["w10 w11", "w12"]
    words = [w for prompt in prompts for w in ("--prompt", prompt)]
    said = command("generate", output, *words).splitlines()
    assert said[::2] == [f"> {prompt}" for prompt in prompts]
    tokenizer, model = make_tokenizer(), load_peft(model_dir, output / "adapter")
    invocation = mezo.MeZOConfig(**valid_json((output / "summary.json").read_text())["config"])
    for prompt, line in zip(prompts, said[1::2], strict=True):
        start = tokenizer(f"{prompt}\n{invocation.invocation or ''}")["input_ids"]
        rows = [[*start, *tokenizer(option)["input_ids"]] for option in options]
        with torch.no_grad():
            means = torch.stack([row_logprobs(model, row, len(start)).mean() for row in rows])
        shares = dict(zip(options, means.softmax(0).tolist(), strict=True))
        best = sorted(shares, key=lambda option: -shares[option])
        assert line == "  ".join(f"{option.strip()} {shares[option]:.3f}" for option in best)
    asked = command("generate", output, "--prompt", "w10", "--max_new_tokens", 2)
    assert asked.strip() not in said


@pytest.mark.parametrize(
    ("shape", "ids"),
    [("chat", [1, 0, 10, 11, 2]), ("label", None), ("completion", None)],
)
def test_prompts_are_worded_as_the_training_s_rows(shape, ids, model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", SHAPES[shape])
    train(model_dir, data, tmp_path / "out")
    expected = {"chat": ids, "label": "w10 w11\n", "completion": "w10 w11"}[shape]
    with open_run(tmp_path / "out") as run:
        assert worded(tmp_path / "out", run, ["w10 w11"]) == [expected]
        answer = run.generate([expected], max_new_tokens=3)[0]
    said = command("generate", tmp_path / "out", "--prompt", "w10 w11", "--max_new_tokens", 3)
    assert said == f"{answer}\n"
