"""The adapter, the estimator and the loop: each option and what it changes."""

from __future__ import annotations

import json
import types
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from mezo.cli import app
from mezo.run import Run
from tests.support.files import logged, saved_weights


def adapter_config(output):
    return json.loads((output / "adapter" / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def trained_before():
    return []


@pytest.fixture
def both(trained, trained_before):
    """Train as usual, once, and with an option; returns what each has left."""

    def left(**option):
        summary, steps, output = trained(**option)
        return SimpleNamespace(
            summary=summary,
            steps=steps,
            weights=saved_weights(output / "adapter"),
            config=adapter_config(output),
        )

    def run(**option):
        if not trained_before:
            trained_before.append(left())
        return trained_before[0], left(**option)

    return run


def test_the_rank(both):
    usual, other = both(lora_r=4)
    assert (usual.config["r"], other.config["r"]) == (2, 4)
    assert {w.shape[0] for n, w in other.weights.items() if n.endswith("lora_A")} == {4}


def test_alpha_scales_what_the_adapter_adds(both):
    usual, other = both(lora_alpha=4)
    assert (usual.config["lora_alpha"], other.config["lora_alpha"]) == (16, 4)
    # B is 0 at first, so both signs move by alpha / rank * eps z A.
    ratio = [abs(run.steps[0].projected_grads[0]) for run in (usual, other)]
    assert ratio[0] == pytest.approx(4 * ratio[1], rel=0.1)


def test_the_modules_that_are_trained(both):
    usual, other = both(lora_target_modules="o_proj")
    moved = [
        {n.split(".")[-2] for n, w in run.weights.items() if "lora_B" in n and w.any()}
        for run in (usual, other)
    ]
    assert moved == [{"q_proj", "v_proj"}, {"o_proj"}]


def test_the_learning_rate(both):
    usual, other = both(learning_rate=0)
    sizes = [
        max(w.abs().max() for n, w in run.weights.items() if "lora_B" in n)
        for run in (usual, other)
    ]
    assert sizes[0] > 0
    assert sizes[1] == 0


def test_eps_is_how_far_the_losses_lie_apart(both):
    usual, other = both(eps=1e-4)  # 1e-2
    apart = [run.steps[0].loss_plus - run.steps[0].loss_minus for run in (usual, other)]
    assert apart[0] == pytest.approx(100 * apart[1], rel=0.2)


def test_the_seed_is_of_directions_and_of_the_order(both):
    usual, other = both(seed=4)
    for name in ("projected_grads", "loss", "tokens"):
        assert [getattr(s, name) for s in usual.steps] != [getattr(s, name) for s in other.steps]
    assert any(not torch.equal(w, other.weights[n]) for n, w in usual.weights.items())


def test_the_number_of_directions(both):
    usual, other = both(num_directions=3)
    for run, count in ((usual, 1), (other, 3)):
        assert [len(s.projected_grads) for s in run.steps] == [count] * 6
        assert [len(s.coefficients) for s in run.steps] == [count] * 6


def test_the_distribution_of_directions(trained):
    sizes = {}
    for name in ("gaussian", "rademacher"):
        _, steps, output = trained(distribution=name, max_steps=1)
        weights = saved_weights(output / "adapter")
        moved = torch.cat([w[w != 0] for n, w in weights.items() if "lora_B" in n])
        sizes[name] = moved.abs().unique()
    assert sizes["rademacher"].tolist() == pytest.approx([abs(steps[0].coefficients[0])])
    assert len(sizes["gaussian"]) > 100


def test_the_bound_on_projected_grads(both):
    usual, other = both(clip=0.5)
    moves = [max(abs(s.coefficients[0]) for s in run.steps) for run in (usual, other)]
    assert moves[1] == pytest.approx(0.5 * 1e-3)
    assert moves[0] > moves[1]


def test_the_invocation_stands_before_the_options(both):
    usual, other = both(invocation=" w9 w9 w9")  # usual: Label:, a token
    assert [a.tokens + 8 * 2 for a in usual.steps] == [b.tokens for b in other.steps]


def test_the_batch_size(both):
    usual, other = both(per_device_train_batch_size=8, num_train_epochs=1, max_steps=None)
    assert (usual.summary["batch_size"], other.summary["batch_size"]) == (4, 8)
    assert other.summary["steps"] == 4  # of 32 examples


def test_the_size_of_an_evaluation_s_batches(trained, monkeypatch):
    sizes, real = [], Run.evaluate

    def evaluate(run, batch, **more):
        found = real(run, batch, **more)
        sizes.append(found.num_examples)
        return found

    monkeypatch.setattr(Run, "evaluate", evaluate)
    losses = []
    for size, expected in ((None, [8]), (3, [3, 3, 2])):
        sizes.clear()
        summary, _, _ = trained(per_device_eval_batch_size=size)
        assert sizes == expected * 2  # before and after
        losses.append(summary["held_out"]["after"]["cross_entropy"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_metric_is_computed_beside_the_loss(trained):
    assert set(trained()[0]["held_out"]["after"]) == {
        *("accuracy", "cross_entropy", "num_examples", "num_nonfinite")
    }
    after = trained(metric="f1")[0]["held_out"]["after"]
    assert 0 <= after["f1"] <= 1


def test_checkpoints_by_epoch(trained):
    _, _, output = trained(max_steps=17)
    assert not list(output.glob("checkpoint-*"))
    trained(max_steps=17, save_strategy="epoch")  # 8 steps
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-8"]


@pytest.mark.parametrize(("greater", "best"), [(None, min), (False, min), (True, max)])
def test_what_is_better_may_be_said(trained, greater, best):
    more = {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-2}
    summary, _, _ = trained(**more, greater_is_better=greater)
    losses = [e["loss"] for e in summary["evaluations"]]
    assert summary["best"]["value"] == best(losses)
    assert min(losses) != max(losses)


def test_lines_of_progress(trained):
    def lines(**options):
        trained(**options)
        return [x.split()[1] for x in trained.output.splitlines() if x.startswith("step ")]

    assert lines() == ["1/6", "6/6"]
    assert lines(logging_steps=2) == ["1/6", "2/6", "4/6", "6/6"]


@pytest.mark.parametrize(("name", "repository"), [(None, "out"), ("me/mine", "me/mine")])
def test_an_upload_goes_where_it_should(trained, monkeypatch, name, repository):
    """At the border of huggingface_hub: there is no network."""
    sent = []

    class HfApi:
        def create_repo(self, name, *, exist_ok):
            return types.SimpleNamespace(repo_id=name)

        def upload_folder(self, *, repo_id, folder_path):
            sent.append((repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_none")
    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    trained()
    assert sent == []
    trained(hub_model_id=name, push_to_hub=True)
    assert sent == [(repository, ["adapter_config.json", "adapter_model.safetensors"])]
    assert f"Uploaded the adapter to {repository}." in trained.output


def test_the_output_is_where_everything_is(trained, options, tmp_path):
    trained()
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    other = tmp_path / "new" / "other"
    result = CliRunner().invoke(app, ["train", *words, "--output", str(other)])
    assert result.exit_code == 0, result.output
    files = [sorted(p.name for p in folder.iterdir()) for folder in (tmp_path / "out", other)]
    assert files[0] == files[1]
    assert [s.loss for s in logged(other)] == [s.loss for s in logged(tmp_path / "out")]
