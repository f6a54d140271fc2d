"""Adding a thing is one class and one row: a small example of each, used in a real run."""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mezo
from mezo import objectives, tasks
from mezo.cli import app
from mezo.data.formats import FORMATS, Record, Table
from mezo.engines import ENGINES, available
from mezo.engines.transformers import TransformersSession
from mezo.objectives import OBJECTIVES
from mezo.objectives.base import Targets
from mezo.objectives.classification import option_scores
from mezo.optim import ESTIMATORS, OPTIMIZERS
from mezo.optim.schedule import SCHEDULES
from mezo.settings import settings_of
from tests.support.files import logged, valid_json
from tests.support.tiny import LINEARS, load_model, random_batch

REGISTRIES = {
    "objectives": OBJECTIVES,
    "estimators": ESTIMATORS,
    "optimizers": OPTIMIZERS,
    "schedules": SCHEDULES,
    "formats": FORMATS,
    "tasks": tasks.TASKS,
    "engines": ENGINES,
}
ROWS = {what: list(rows) for what, rows in REGISTRIES.items()}


@pytest.fixture
def register(request):
    """A function that adds a row for the test's time."""

    def add(registry, name, thing):
        registry.register(name, thing)
        request.addfinalizer(lambda: registry.unregister(name))

    return add


@pytest.fixture
def model(tiny_model_dir):
    return load_model(tiny_model_dir("llama"))


def attached(model, **changes):
    settings = {"rank": 2, "target_modules": LINEARS, "lr": 1e-4, "seed": 1, **changes}
    return mezo.attach(model, mezo.MeZOConfig(**settings))


class Margin:
    """A hinge on the right option's lead over the best other one."""

    needs_options = True

    def loss(self, targets, logprob_sums):
        terms = self.example_losses(targets, logprob_sums)
        return sum(sorted(terms)) / len(terms)

    def example_losses(self, targets, logprob_sums):
        leads = [
            scores[label] - max(s for i, s in enumerate(scores) if i != label)
            for scores, label in zip(
                option_scores(targets, logprob_sums), targets.labels, strict=True
            )
        ]
        return [max(0.0, 1.0 - lead) for lead in leads]

    def predictions(self, targets, logprob_sums):
        return OBJECTIVES["classification"].predictions(targets, logprob_sums)

    def is_normalised(self, targets):
        return (True,) * len(targets.counts)


def test_an_objective(model, register):
    register(OBJECTIVES, "margin", Margin())
    fields = random_batch(random.Random(0), kind="options")
    batch = mezo.Batch(fields.prompts, options=fields.options, labels=fields.labels)
    margin = mezo.Batch(
        fields.prompts, options=fields.options, labels=fields.labels, objective="margin"
    )
    with attached(model) as run:
        for _ in range(3):
            result = mezo.step(run, margin)
            assert result.status is mezo.StepStatus.OK
        scores, plain = run.evaluate(margin), run.evaluate(batch)
    assert result.loss != plain.loss
    assert scores.predictions == plain.predictions  # the same scores, another loss
    assert scores.loss != plain.loss


def test_an_estimator(model, register):
    class Sign:
        def projected_grads(self, losses_plus, losses_minus, eps):
            return [
                float((p > m) - (p < m)) for p, m in zip(losses_plus, losses_minus, strict=True)
            ]

    register(ESTIMATORS, "sign", Sign())
    with attached(model, estimator="sign", num_directions=2) as run:
        result = mezo.step(run, random_batch(random.Random(1)))
    signs = [1.0 if plus > minus else -1.0 for plus, minus in result.losses]
    assert list(result.projected_grads) == signs
    assert list(result.coefficients) == [-1e-4 * sign / 2 for sign in signs]


def test_an_optimizer(model, register):
    seen = []

    class Double:
        def coefficients(self, step, history):
            seen.append(history[-1])
            grads = history[-1].projected_grads
            return [((step, k), -2.0 * history[-1].lr * g) for k, g in enumerate(grads)]

    register(OPTIMIZERS, "double", Double())
    batch = random_batch(random.Random(2))
    with attached(model, optimizer="double") as run:
        result = mezo.step(run, batch, lr=1e-3)
        weights = run.weights()
    assert (seen[0].step, seen[0].lr) == (0, 1e-3)
    assert result.coefficients == (-2e-3 * result.projected_grads[0],)
    with attached(model) as run:
        mezo.step(run, batch, lr=2e-3)
        assert all(torch.equal(weights[name], value) for name, value in run.weights().items())


def test_an_optimizer_that_names_past_directions_is_refused_and_moves_nothing(model, register):
    class Past:
        def coefficients(self, step, history):
            return [((step - 1, 0), 1.0)]

    register(OPTIMIZERS, "past", Past())
    with attached(model, optimizer="past") as run:
        before = run.weights()
        with pytest.raises(NotImplementedError, match="'past' must return one coefficient for"):
            mezo.step(run, random_batch(random.Random(3)))
        assert all(torch.equal(before[name], value) for name, value in run.weights().items())


def test_a_schedule(model, register):
    register(SCHEDULES, "halves", lambda base, progress: base * (1.0 if progress < 0.5 else 0.5))
    batch, rates = random_batch(random.Random(4)), []

    def note(progress):
        if progress.result:
            result = progress.result
            rates.append(-result.coefficients[0] / result.projected_grads[0])

    with attached(model) as run:
        mezo.MeZOTrainer(run, [batch] * 4, num_steps=4, schedule="halves", callbacks=[note]).train()
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5])


class Tabs:
    """Lines of label, tab, text."""

    suffixes = (".tabs",)

    def read(self, path):
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        return Table(
            ("text", "label"),
            [
                Record(f"{path}:{i}", {"text": text, "label": label})
                for i, (label, text) in enumerate(lines, 1)
            ],
        )


def load(path):
    examples = [
        tasks.Example(
            record.fields["text"],
            options=(" bad", " good"),
            label=int(record.fields["label"]),
            where=record.where,
        )
        for record in FORMATS["tabs"].read(path).records
    ]
    return tasks.Splits(train=examples[8:], dev=[], test=examples[:8])


class Wrapped:
    """A handle that only our engine knows."""

    def __init__(self, model):
        self.model = model


class WrappedEngine:
    def why_not(self):
        return None

    @contextmanager
    def launch(self, model, config, *, threads=None):
        yield Wrapped(load_model(model))

    def open(self, handle, config, tokenizer):
        if not isinstance(handle, Wrapped):
            return None
        return TransformersSession(handle.model, config, tokenizer)


def test_a_format_a_task_and_an_engine(tiny_model_dir, tmp_path, register):
    preset = {"num_steps": 3, "lr": 1e-3, "batch_size": 4, "target_modules": ("q_proj",)}
    task = tasks.Task(
        name="words",
        load=load,
        invocation=" w9",
        preset=preset,
    )
    register(FORMATS, "tabs", Tabs())
    register(tasks.TASKS, "words", task)
    register(ENGINES, "wrapped", WrappedEngine())
    data = tmp_path / "data.tabs"
    data.write_text("".join(f"{i % 2}\tw{10 + i} w{40 + i}\n" for i in range(20)))
    model, output = tiny_model_dir("llama"), tmp_path / "out"
    arguments = f"train --task words --engine wrapped --model {model} --data {data}"
    result = CliRunner().invoke(app, [*arguments.split(), "--output", str(output), "--rank", "2"])
    assert result.exit_code == 0, result.output
    summary = valid_json((output / "summary.json").read_text())
    assert (summary["task"], summary["engine"], summary["steps"]) == ("words", "wrapped", 3)
    assert summary["config"]["target_modules"] == ["q_proj"]
    assert (summary["config"]["rank"], summary["config"]["lr"]) == (2, 1e-3)
    assert summary["train_examples"] == 12
    assert len(logged(output)) == 3
    assert available()["wrapped"] is None


def test_the_examples_are_gone_again():
    assert {what: list(rows) for what, rows in REGISTRIES.items()} == ROWS


@pytest.mark.parametrize("field", ["estimator", "optimizer"])
def test_an_unknown_name_is_refused_when_the_run_is_configured(field):
    with pytest.raises(ValueError, match=f"MeZOConfig: {field} must be one of: .* got 'adam'"):
        mezo.MeZOConfig(**{field: "adam"})


class Fixed:
    """An estimator that returns what it was made with."""

    def __init__(self, *values):
        self.values = values

    def projected_grads(self, losses_plus, losses_minus, eps):
        return list(self.values)


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_an_estimator_must_speak_of_every_direction(values, model, register):
    register(ESTIMATORS, "fixed", Fixed(*values))
    run = attached(model, estimator="fixed", num_directions=2)
    before = run.weights()
    with pytest.raises(NotImplementedError, match=f"each of the 2 directions .* got {len(values)}"):
        run.step(random_batch(random.Random(0)))
    assert run.steps == 0
    after = run.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    run.close()


def test_numbers_of_numpy_become_python_s(model, register):
    register(ESTIMATORS, "fixed", Fixed(np.float32(0.1)))
    with attached(model, estimator="fixed") as run:
        result = run.step(random_batch(random.Random(0)))
    assert {type(x) for x in (*result.projected_grads, *result.coefficients)} == {float}


def test_a_batch_keeps_the_objective_it_was_given():
    options = mezo.Batch(prompts=["a"], options=["b", "c"], labels=[0])
    completions = dataclasses.replace(options, options=None, labels=None, completions=["b"])
    assert (options.objective, completions.objective) == (None, None)


def test_an_objective_that_this_process_lacks_is_named(register):
    with pytest.raises(ValueError, match=r"every process that scores, got 'margin', .* top level"):
        objectives.of(Targets(counts=(1,), objective="margin"))


def test_a_preset_with_an_unknown_field_is_refused(register):
    known = tasks.get("rotten_tomatoes")
    task = dataclasses.replace(known, name="misspelt", preset={"num_step": 3})
    register(tasks.TASKS, "misspelt", task)
    with pytest.raises(ValueError, match=r"preset of task 'misspelt' .* got \['num_step'\]"):
        settings_of(task="misspelt", output="x")


def test_warnings_of_a_run_on_transformers_are_seen_beside_sglang(model, monkeypatch):
    """SGLang sets the root logger's level to that of its server, mostly "error"."""
    monkeypatch.setitem(sys.modules, "sglang", sys)
    ours = logging.getLogger("mezo")
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    with attached(model):
        assert ours.level == logging.WARNING
    ours.setLevel(logging.NOTSET)
