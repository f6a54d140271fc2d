"""Values as users have them: NumPy, torch and lists alike; a sentence names any other one."""

from __future__ import annotations

import array
import collections
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

import mezo
from mezo._host import fp32_products
from tests.support.tiny import VOCAB, load_model, make_tokenizer

NAN = float("nan")
CHAT = [{"role": "user", "content": "w5"}]
FINE = {"prompts": [[5, 6], [7, 8]], "options": [[3], [4]], "labels": [0, 1]}
TEXTS = {"prompts": ["w5 w6", "w7 w8"], "options": [" bad", " good"], "labels": [1, 0]}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"))


@pytest.fixture
def run(model):
    with mezo.attach(model, mezo.MeZOConfig(rank=2), tokenizer=make_tokenizer()) as run:
        yield run


def is_plain(value) -> bool:
    """Whether a value is made of Python's own types only, as JSON has them."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return type(value) in (int, float, str, type(None))


ALIKE = {
    "tuples": {"prompts": ((5, 6), (7, 8)), "options": ((3,), (4,)), "labels": (0, 1)},
    "arrays": {k: np.array(v) for k, v in FINE.items()},
    "narrow arrays": {k: np.array(v, dtype=np.uint16) for k, v in FINE.items()},
    "tensors": {k: torch.tensor(v) for k, v in FINE.items()},
    "lists of arrays": {
        "prompts": [np.array([5, 6]), torch.tensor([7, 8])],
        "options": [np.array([3]), torch.tensor([4])],
        "labels": [np.int64(0), torch.tensor(1)],
    },
    "lists of scalars": {
        "prompts": [[np.int32(5), torch.tensor(6)], [np.uint8(7), 8]],
        "options": [[np.array(3)], [4]],
        "labels": [False, np.True_],
    },
    "a whole number as float": {**FINE, "labels": [0.0, np.float32(1.0)]},
    "other sequences": {
        "prompts": collections.deque([array.array("i", [5, 6]), range(7, 9)]),
        "options": iter([[3], [4]]),
        "labels": torch.tensor([False, True]),
    },
}


@pytest.mark.parametrize("fields", ALIKE.values(), ids=ALIKE.keys())
def test_ids_and_labels_of_every_kind_are_one_batch(fields):
    batch = mezo.Batch(**fields)
    assert batch == mezo.Batch(**FINE)
    assert all(is_plain(v) for v in (batch.prompts, batch.options, batch.labels))
    assert json.loads(json.dumps(batch.labels)) == [0, 1]


def test_texts_and_options_of_every_kind_are_one_batch():
    for kind in (list, tuple, np.array, iter):
        batch = mezo.Batch(**{name: kind(values) for name, values in TEXTS.items()})
        assert batch == mezo.Batch(**TEXTS)
        assert all(is_plain(v) for v in (batch.prompts, batch.options, batch.labels))
    own = [["w3", "w4"], ["w5", "w6"]]
    for options in (np.array(own), [np.array(o) for o in own], tuple(tuple(o) for o in own)):
        assert mezo.Batch(**{**TEXTS, "options": options}).pairs() == [
            ("w5 w6", "w3"),
            ("w5 w6", "w4"),
            ("w7 w8", "w5"),
            ("w7 w8", "w6"),
        ]
    nested = torch.tensor([[[3], [4]], [[5], [6]]])
    assert mezo.Batch(**{**FINE, "options": nested}).options == nested.tolist()


def test_a_batch_of_arrays_takes_the_step_of_a_batch_of_lists(model):
    results = []
    for fields, kind in ((FINE, list), (FINE, np.array), (FINE, torch.tensor)):
        with mezo.attach(model, mezo.MeZOConfig(rank=2, lr=1e-3)) as run:
            batch = mezo.Batch(**{name: kind(values) for name, values in fields.items()})
            lr = {
                list: 2e-3,
                np.array: np.float64(2e-3),
                torch.tensor: torch.tensor(2e-3, dtype=torch.float64),
            }
            result = run.step(batch, lr=lr[kind])
            results.append((result.losses, result.coefficients))
            assert is_plain(result.coefficients)
    assert results[0] == results[1] == results[2]


BAD_BATCHES = {
    "a fraction as label": ({"labels": [0, 0.7]}, r"labels\[1\] must be the index .* got 0.7;"),
    "a text as label": ({"labels": [0, "good"]}, r"labels\[1\] .* got 'good'; pass an index in"),
    "NaN as label": ({"labels": [NAN, 0]}, r"labels\[0\] must be the index .* got nan;"),
    "None as label": ({"labels": [0, None]}, r"labels\[1\] must be the index .* got None;"),
    "an infinite label": ({"labels": [0, float("inf")]}, r"labels\[1\] must be the index"),
    "a label below 0": ({"labels": [0, -100]}, r"labels\[1\] must name one of the 2 options"),
    "one-hot labels": ({"labels": [[0, 1], [1, 0]]}, r"labels\[0\] .* got \[0, 1\];"),
    "one label": ({"labels": 1}, "labels must be a list with an entry for each .* got 1; put it"),
    "labels by prompt": ({"labels": {"a": 0, "b": 1}}, "labels must be a list .* got dict with"),
    "one prompt": ({"prompts": "w5"}, "prompts must be a list .* got one text; put it into a list"),
    "one NumPy text": ({"prompts": np.array("w5")}, "prompts must be a list .* got one text"),
    "one option": ({"options": "good"}, "options must be a list .* got one text; put it into"),
    "a set of options": ({"options": {"bad", "good"}}, "options must be a list .* got {'"),
    "no prompts": ({"prompts": None}, "prompts must be a list .* got None"),
    "bytes": ({"prompts": [b"w5", b"w6"]}, r"prompts\[0\] must be text .* got b'w5';"),
    "None among prompts": ({"prompts": ["w5", None]}, r"prompts\[1\] must be text .* got None; dr"),
    "NaN among prompts": ({"prompts": ["w5", NAN]}, r"prompts\[1\] must be text .* got nan; drop"),
    "ids without a list": ({"prompts": [5, 6]}, r"prompts\[0\] must be text .* got 5;"),
    "a fraction as id": (
        {"prompts": [[5, 6.5], [7]]},
        r"prompts\[0\]\[1\] .* integer >= 0, got 6.5",
    ),
    "a float as id": ({"prompts": np.ones((2, 3))}, r"prompts\[0\]\[0\] must be a token id.* 1.0;"),
    "a bool as id": (
        {"prompts": [[5], [True]]},
        r"prompts\[1\]\[0\] must be a token id.* got True",
    ),
    "an id below 0": (
        {"prompts": [[5], [7, -1]]},
        r"prompts\[1\]\[1\] must be a token id.* got -1",
    ),
    "None as id": ({"prompts": [[5], [None]]}, r"prompts\[1\]\[0\] must be a token id.* got None"),
    "texts as ids": (
        {"prompts": [["w5"], ["w6"]]},
        r"prompts\[0\]\[0\] .* got 'w5'; pass one text",
    ),
    "a message": ({"prompts": CHAT * 2}, r"prompts\[0\] .* tokenizer.apply_chat_template"),
    "messages": ({"prompts": [CHAT, CHAT]}, r"prompts\[0\]\[0\] .* tokenizer.apply_chat_template"),
    "what a tokenizer gives": (
        {"prompts": make_tokenizer()(["w5", "w6"])},
        "prompts must be a list .* got BatchEncoding with the keys .*; pass its 'input_ids'",
    ),
    "a record": (
        {"prompts": [{"text": "w5"}] * 2},
        r"prompts\[0\] .* got dict with the keys \['te",
    ),
    "None among options": ({"options": ["bad", None]}, r"options\[1\] must be text .* got None;"),
    "a number among options": ({"options": ["bad", 4]}, r"options\[1\] must be text .* got 4;"),
    "None in own options": (
        {"options": [["bad", "good"], ["bad", None]]},
        r"options\[1\]\[1\] must be text .* got None;",
    ),
    "own and shared options": (
        {"options": [["bad", "good"], "good"]},
        r"options\[1\] must be a list of options as the others are, got 'good'",
    ),
    "one own option": (
        {"options": [["a", "b"], []]},
        "prompt 1 must have at least 2 options, got 0",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_what_no_batch_is_made_of(change, sentence):
    with pytest.raises(ValueError, match=f"^Batch: {sentence}") as caught:
        mezo.Batch(**{**TEXTS, **change})
    assert len(str(caught.value).splitlines()) == 1
    for name in ("prompts", "options"):  # the same holds for completions
        if change.get(name) is not None and "option" not in sentence:
            with pytest.raises(ValueError, match=r"^Batch: completions"):
                mezo.Batch(prompts=["w5", "w6"], completions=change[name])


BAD_CALLS = {
    "step: a batch": (lambda run: run.step({"prompts": ["w5"]}), "batch must be a mezo.Batch, got"),
    "step: no batch": (lambda run: run.step(None), "batch must be a mezo.Batch, got None"),
    "step: lr as text": (lambda run: run.step(BATCH, lr="1e-3"), "lr .* got '1e-3'; pass a number"),
    "step: lr below 0": (lambda run: run.step(BATCH, lr=-1e-3), "lr must be .* >= 0, got -0.001"),
    "step: lr NaN": (lambda run: run.step(BATCH, lr=NAN), "lr must be a finite number .* got nan"),
    "step: lr as bool": (lambda run: run.step(BATCH, lr=True), "lr must be .* got True"),
    "step: lr as array": (lambda run: run.step(BATCH, lr=np.ones(2)), "got ndarray of shape"),
    "mezo.step: run": (
        lambda run: mezo.step("run", BATCH),
        "step: run must be a mezo.Run, got 'run'",
    ),
    "mezo.step: model": (lambda run: mezo.step(torch.nn.Linear(1, 1), BATCH), "run must .* Linear"),
    "pair_losses: eps": (lambda run: run.pair_losses(BATCH, eps="0"), "eps must be .* got '0'"),
    "measure: eps": (lambda run: run.measure(BATCH, eps=-1.0), "eps must be .* >= 0, got -1.0"),
    "measure: eps NaN": (lambda run: run.measure(BATCH, eps=NAN), "eps must be .* got nan"),
    "measure: offset": (lambda run: run.measure(BATCH, offset=0.5), "offset must be .* got 0.5"),
    "measure: offset -2": (
        lambda run: run.measure(BATCH, offset=-2),
        "at least -1, got -2; use 0",
    ),
    "evaluate: batch": (lambda run: run.evaluate([BATCH]), "batch must be a mezo.Batch, got"),
    "encode: batch": (lambda run: run.encode("w5"), "batch must be a mezo.Batch, got 'w5'"),
    "apply_update: text": (lambda run: run.apply_update("1"), "coefficients must have .* got '1'"),
    "apply_update: None": (lambda run: run.apply_update(None), "coefficients must .* got None"),
    "apply_update: number": (lambda run: run.apply_update(0.1), "coefficients must .* got 0.1"),
    "apply_update: NaN": (lambda run: run.apply_update([NAN]), r"coefficients\[0\] must be .* nan"),
    "apply_update: texts": (lambda run: run.apply_update(["1"]), r"coefficients\[0\] .* got '1'"),
    "apply_updates: number": (lambda run: run.apply_updates(1), "must be a list .* step, got 1"),
    "apply_updates: flat": (lambda run: run.apply_updates([0.1]), "coefficients must .* got 0.1"),
    "set_weights: none": (lambda run: run.set_weights({}), "weights must be those of the .* got 0"),
    "generate: tokens": (
        lambda run: run.generate([[1, 5]], max_new_tokens=0),
        "generate: max_new_tokens must be an integer >= 1, got 0",
    ),
    "save: None": (lambda run: run.save(None), "save: directory must be a path, got None"),
    "save: number": (lambda run: run.save(3), "save: directory must be a path, got 3"),
    "attach: engine": (lambda run: mezo.attach("a model"), "engine must be .* got str; make one"),
    "attach: config": (
        lambda run: mezo.attach(run.session.model, {"rank": 8}),
        "attach: config must be a mezo.MeZOConfig, got dict with the keys",
    ),
    "attach: tokenizer": (
        lambda run: mezo.attach(run.session.model, tokenizer="gpt2"),
        "tokenizer must be a Hugging Face tokenizer, got 'gpt2'; pass transformers.AutoTokenizer",
    ),
    "finetune: config": (
        lambda run: mezo.finetune("model", [BATCH], num_steps=1, config=8),
        "finetune: config must be a mezo.MeZOConfig, got 8",
    ),
    "finetune: output": (
        lambda run: mezo.finetune("model", [BATCH], num_steps=1, output=8),
        "finetune: output must be a path, got 8",
    ),
    "launch_engine: config": (
        lambda run: mezo.launch_engine("model", 8),
        "config must be .* got 8",
    ),
    "launch_engine: threads": (
        lambda run: mezo.launch_engine("model", threads="2"),
        "threads must be an integer >= 1, got '2'",
    ),
    "trainer: run": (
        lambda run: mezo.MeZOTrainer(None, [BATCH], num_steps=1),
        "run must be a mezo.Run, got None",
    ),
    "trainer: one batch": (
        lambda run: mezo.MeZOTrainer(run, BATCH, num_steps=1),
        "batches must be an iterable of mezo.Batch, got Batch; put batches into a list",
    ),
    "trainer: no batches": (
        lambda run: mezo.MeZOTrainer(run, None, num_steps=1),
        "batches must be an iterable of mezo.Batch, got None",
    ),
    "trainer: held_out": (
        lambda run: mezo.MeZOTrainer(run, [BATCH], num_steps=1, held_out=BATCH),
        "held_out must be an iterable of mezo.Batch, got Batch",
    ),
    "trainer: num_steps": (
        lambda run: mezo.MeZOTrainer(run, [BATCH], num_steps="3"),
        "num_steps must be an integer, got '3'",
    ),
    "trainer: eval_every": (
        lambda run: mezo.MeZOTrainer(run, [BATCH], num_steps=1, eval_every=0.5),
        "eval_every must be an integer, got 0.5",
    ),
    "trainer: schedule": (
        lambda run: mezo.MeZOTrainer(run, [BATCH], num_steps=1, schedule=None),
        "schedule must be one of: constant, linear, cosine; got None, use 'constant'",
    ),
    "trainer: callbacks": (
        lambda run: mezo.MeZOTrainer(run, [BATCH], num_steps=1, callbacks=print),
        "callbacks must be a list of functions, got",
    ),
    "prefix_bias: run": (
        lambda run: mezo.prefix_bias(None, []),
        "run must be a mezo.Run, got None",
    ),
    "prefix_bias: batches": (
        lambda run: mezo.prefix_bias(run, BATCH),
        "prefix_bias: batches must be an iterable of mezo.Batch, got Batch",
    ),
}
BATCH = mezo.Batch(**FINE)


@pytest.mark.parametrize(("call", "sentence"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_wrong_argument_is_named_and_changes_nothing(run, call, sentence):
    run.apply_update([0.5])
    before = run.weights()
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        call(run)
    assert len(str(caught.value).splitlines()) == 1
    assert run.steps == 1
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prefix": "activated"}, r"made for prefix 'activated' .* got one for 'exact'"),
        ({"invocation": (7, 9)}, r"invocation tokens \(7, 9\), got one for 'exact' and \(7, 8\)"),
    ],
)
def test_rows_that_another_run_has_encoded_are_refused(tiny_model_dir, change, sentence):
    config = mezo.MeZOConfig(rank=2, invocation=(7, 8))
    with mezo.attach(load_model(tiny_model_dir("llama")), config) as run:
        encoded = run.encode(mezo.Batch(prompts=[[1, 5, 6]], completions=[[9]]))
        run.step(encoded)
    other = dataclasses.replace(config, **change)
    with mezo.attach(load_model(tiny_model_dir("llama")), other) as run:
        for call in (run.step, run.evaluate, run.pair_losses):
            with pytest.raises(ValueError, match=sentence):
                call(encoded)
        assert run.steps == 0


def test_every_public_function_is_in_a_table():
    made_by_mezo = {"EvalResult", "NonfiniteLossError", "PrefixBias", "StepResult", "StepStatus"}
    in_tables_of_their_own = {"Batch", "MeZOConfig"}  # BAD_BATCHES, test_config
    tried = {name.partition(":")[0] for name in BAD_CALLS}
    assert {"attach", "finetune", "launch_engine", "prefix_bias", "mezo.step", "trainer"} <= tried
    assert {"Run", "MeZOTrainer", *in_tables_of_their_own, *made_by_mezo} <= set(mezo.__all__)
    without_arguments = {"weights", "close", "sync"}
    methods = {n for n, f in vars(mezo.Run).items() if callable(f) and not n.startswith("_")}
    # Made from arguments that are checked before.
    assert methods - without_arguments - {"note", "request"} <= tried


def test_numpy_and_torch_arguments_of_a_run(run):
    eps = run.pair_losses(BATCH, eps=np.float64(1e-3)).losses
    assert eps == run.pair_losses(BATCH, eps=1e-3).losses
    assert eps == run.measure(BATCH, eps=torch.tensor(1e-3, dtype=torch.float64)).losses
    offset = run.measure(BATCH, offset=np.int64(2)).losses
    assert offset == run.measure(BATCH, offset=2).losses
    for coefficients in (np.array([0.5]), torch.tensor([0.5]), (np.float32(0.5),)):
        before = run.steps
        run.apply_update(coefficients)
        assert run.steps == before + 1
    run.apply_update(np.array([]))


def test_text_needs_the_tokenizer_that_attach_was_given(model):
    with mezo.attach(model, mezo.MeZOConfig(rank=2), tokenizer=make_tokenizer()) as run:
        text = run.evaluate(mezo.Batch(prompts=["w5 w6"], completions=[" w7"]))
        ids = run.evaluate(mezo.Batch(prompts=[[5, 6]], completions=[[7]]))
        assert text == ids
        with pytest.raises(ValueError, match=f"must lie in the model's vocabulary of {VOCAB}"):
            run.step(mezo.Batch(prompts=[[5]], completions=[[VOCAB]]))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_fp32_products_are_told_at_attach(model, caplog, precision):
    def attached():
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mezo"):
            mezo.attach(model, mezo.MeZOConfig(rank=2)).close()
        return [r.getMessage() for r in caplog.records if "fp32 products" in r.getMessage()]

    assert fp32_products() is None
    assert attached() == []
    try:
        torch.set_float32_matmul_precision(precision)
        assert fp32_products() == {"high": "tf32", "medium": "bf16"}[precision]
        assert len(attached()) == 1
        assert "set_float32_matmul_precision('highest')" in attached()[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert attached() == []
