"""A file of rows -> an adapter: each option of the loop and what it changes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml
from typer.testing import CliRunner

import mezo
from mezo.cli import app
from mezo.engines import ENGINES
from mezo.optim.schedule import learning_rate
from mezo.train.trainer import MeZOTrainer
from tests.support.files import saved_weights, valid_json


def test_own_rows_leave_a_whole_run_directory(trained):
    summary, steps, output = trained(eval_steps=3)
    assert (summary["completed"], summary["steps"], len(steps)) == (True, 6, 6)
    assert (summary["train_examples"], summary["held_out"]["after"]["num_examples"]) == (32, 8)
    assert summary["label_names"] == ["bad", "good"]
    assert "data: text = text, label = label (text and label), labels bad, good" in trained.output
    assert "8 of 40 examples are held out to evaluate on" in trained.output
    results = valid_json((output / "all_results.json").read_text())
    assert results["eval_accuracy"] == summary["held_out"]["after"]["accuracy"]
    assert results["train_steps"] == 6
    card = (output / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], head["base_model"]) == ("peft", summary["model_path"])
    assert "mezo train --config run.yaml" in card
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_yaml_python_and_the_command_line_are_one_trajectory(options, trained, tmp_path):
    _, _, output = trained()
    first = saved_weights(output / "adapter")
    by_yaml, by_python = tmp_path / "yaml", tmp_path / "python"
    result = CliRunner().invoke(
        app, ["train", "--config", str(output / "run.yaml"), "--output", str(by_yaml)]
    )
    assert result.exit_code == 0, result.output
    python = {**options, "output_dir": by_python}
    mezo.finetune(python.pop("model_name_or_path"), python.pop("dataset_name"), **python)
    for other in (by_yaml, by_python):
        again = saved_weights(other / "adapter")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_rows_in_memory_and_an_engine_of_one_s_own(options, rows, trained, tmp_path):
    from tests.support.tiny import load_model, make_tokenizer

    _, _, output = trained()
    first = saved_weights(output / "adapter")
    model = load_model(options["model_name_or_path"])
    more = {**options, "output_dir": tmp_path / "rows"}
    del more["model_name_or_path"], more["dataset_name"], more["engine"]
    summary = mezo.finetune(model, rows, tokenizer=make_tokenizer(), **more)
    assert summary.steps == 6
    again = saved_weights(tmp_path / "rows" / "adapter")
    assert all(torch.equal(first[name], again[name]) for name in first)
    left = valid_json((tmp_path / "rows" / "summary.json").read_text())
    assert left["engine"] == "transformers"


def test_a_model_in_memory_brings_its_own_tokenizer(options, rows, trained, tmp_path):
    from tests.support.tiny import load_model

    _, _, output = trained()
    first = saved_weights(output / "adapter")
    model = load_model(options["model_name_or_path"])
    more = {**options, "output_dir": tmp_path / "rows"}
    del more["model_name_or_path"], more["dataset_name"]
    mezo.finetune(model, rows, **more)
    again = saved_weights(tmp_path / "rows" / "adapter")
    assert all(torch.equal(first[name], again[name]) for name in first)
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ValueError, match="a model in memory must come with its tokenizer"):
        mezo.finetune(model, rows, **more)


def test_epochs_and_accumulation(trained):
    summary, _, _ = trained(max_steps=None, num_train_epochs=2)
    assert summary["steps"] == 16  # 32 examples
    summary, _, _ = trained(max_steps=None, num_train_epochs=1, gradient_accumulation_steps=2)
    assert (summary["steps"], summary["batch_size"]) == (4, 8)


@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_ratio": 0.5}])
def test_warmup_and_schedule(trained, warmup):
    _, steps, _ = trained(lr_scheduler_type="linear", **warmup)
    rates = [-s.coefficients[0] / s.projected_grads[0] for s in steps]
    expected = [1e-3 * x for x in (0.25, 0.5, 0.75, 1.0, 2 / 3, 1 / 3)]
    assert rates == pytest.approx(expected)
    assert [s.lr for s in steps] == pytest.approx(expected)
    assert learning_rate(1.0, 2, 6, "constant", warmup_steps=4) == 0.6


def test_evaluations_by_epoch_and_checkpoints(trained):
    summary, _, output = trained(
        max_steps=24, eval_strategy="epoch", save_steps=5, save_total_limit=2
    )
    assert [e["step"] for e in summary["evaluations"]] == [0, 8, 16, 24]
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]
    assert saved_weights(output / "checkpoint-15")


def test_a_checkpoint_is_the_adapter_of_its_step(trained):
    _, _, output = trained(save_steps=6)
    last, saved = saved_weights(output / "checkpoint-6"), saved_weights(output / "adapter")
    assert all(torch.equal(last[name], saved[name]) for name in saved)


@pytest.fixture
def losses(monkeypatch):
    """Lets held-out losses be what a test says."""

    def set_to(*values):
        real, left = MeZOTrainer.evaluate, list(values)

        def evaluate(self, step, seconds):
            metrics = self.metrics
            self.metrics = None
            try:
                import dataclasses

                from mezo.train import trainer

                found = trainer.evaluate(self.run, self.held_out)
                changed = dataclasses.replace(found, loss=left.pop(0))
                monkeypatch.setattr(trainer, "evaluate", lambda *_: changed)
                return real(self, step, seconds)
            finally:
                monkeypatch.undo()
                monkeypatch.setattr(MeZOTrainer, "evaluate", evaluate)
                self.metrics = metrics

        monkeypatch.setattr(MeZOTrainer, "evaluate", evaluate)

    return set_to


def test_the_best_adapter_is_saved_in_the_end(trained, losses):
    losses(3.0, 2.0, 1.0, 1.5)
    summary, _, output = trained(eval_steps=2, save_strategy="best", load_best_model_at_end=True)
    assert summary["best"] == {"step": 4, "metric": "loss", "value": 1.0}
    assert summary["held_out"]["after"]["cross_entropy"] == 1.0
    assert "The adapter is that of step 4, the best one." in trained.output
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best, saved = saved_weights(output / "checkpoint-4"), saved_weights(output / "adapter")
    assert all(torch.equal(best[name], saved[name]) for name in saved)


def test_ctrl_c_leaves_the_last_adapter_and_says_so(options, losses, tmp_path):
    losses(3.0, 1.0, 2.0, 2.0)

    def interrupt(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    model, data = options.pop("model_name_or_path"), options.pop("dataset_name")
    more = {**options, "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        mezo.finetune(model, data, callbacks=[interrupt], **more)
    summary = valid_json((tmp_path / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["best"]["step"]) == (5, 2)
    assert summary["is_best_loaded"] is False


def test_waiting_for_a_better_one_ends(trained, losses):
    losses(1.0, 2.0, 0.5, 3.0, 4.0)
    summary, steps, _ = trained(max_steps=100, eval_steps=2, early_stopping_patience=2)
    assert (summary["steps"], len(steps), summary["problems"]) == (8, 8, [])
    assert summary["best"]["step"] == 4


def test_a_greater_metric_is_better(trained):
    summary, _, _ = trained(
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_accuracy"
    )
    found = [e["accuracy"] for e in summary["evaluations"]]
    assert summary["best"]["value"] == max(found)
    assert summary["best"]["step"] == summary["evaluations"][found.index(max(found))]["step"]
    result = CliRunner().invoke(app, ["train", "--help"])
    assert "--metric_for_best_model" in result.output


def test_an_unknown_metric_is_refused_at_the_start(options):
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    more = ["--eval_steps", "2", "--load_best_model_at_end", "--metric_for_best_model", "bleu"]
    result = CliRunner().invoke(app, ["train", *words, *more])
    assert result.exit_code == 2
    assert "metric_for_best_model must be among ['accuracy', 'loss'], got 'bleu'" in result.output
    assert "Starting the" not in result.output


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--load_best_model_at_end"], "load_best must"),
        (["--early_stopping_patience", "2", "--save_strategy", "best"], "patience and save_strat"),
    ],
)
def test_nothing_is_chosen_on_nothing(options, tmp_path, more, named):
    path = tmp_path / "few.csv"
    path.write_text("text,label\nw5 w6,good\nw7,bad\n")
    words = [w for k, v in {**options, "dataset_name": path}.items() for w in (f"--{k}", str(v))]
    words += ["--batch_size", "1", "--eval_steps", "2", *more]
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 2
    assert named in result.output
    assert "must come with held-out examples, got none; give eval_data" in result.output
    assert "Starting the" not in result.output


def test_hugging_face_s_callbacks(options, tmp_path):
    events = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            events.append("on_train_begin")

        def on_train_end(self, *args, **kwargs):
            events.append("on_train_end")

        def on_save(self, *args, **kwargs):
            events.append("on_save")

        def on_step_end(self, args, state, control, **kwargs):
            assert state.max_steps == 6
            control.should_evaluate = state.global_step == 1
            control.should_save = state.global_step == 2
            control.should_training_stop = state.global_step == 4

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs = [*getattr(self, "logs", []), logs]

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            events.append("on_evaluate")
            assert metrics["eval_accuracy"] <= 1.0

    watch = Watch()
    model, data = options.pop("model_name_or_path"), options.pop("dataset_name")
    summary = mezo.finetune(model, data, callbacks=[watch], logging_steps=1, **options)
    assert (summary.steps, summary.problems) == (4, ())
    assert events.count("on_train_begin") == events.count("on_train_end") == 1
    assert events[-1] == "on_train_end"
    assert events.count("on_evaluate") == 3  # before, when asked, after
    assert events.count("on_save") == 1
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_config.json").exists()
    steps = [log for log in watch.logs if "loss" in log]
    assert len(steps) == 4
    assert set(steps[0]) >= {
        *("loss", "learning_rate", "epoch", "num_tokens", "projected_grad", "signal_to_noise"),
        *("prompt_tokens_reused", "step_time"),
    }
    assert steps[1]["epoch"] == 2 / 8


def test_compute_metrics_as_in_trainer(options):
    def compute(prediction):
        assert prediction.predictions.shape == (8, 2)
        return {"hits": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    summary = mezo.finetune(
        options.pop("model_name_or_path"),
        options.pop("dataset_name"),
        compute_metrics=compute,
        **options,
    )
    assert summary.after.metrics == {"hits": summary.after.accuracy}


def test_an_upload_needs_a_login_and_a_network(options, monkeypatch):
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = CliRunner().invoke(app, ["train", *words, "--push_to_hub"])
    assert result.exit_code == 2
    assert "push_to_hub must have a token, got none; run `hf auth login`" in result.output
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_none")
    result = CliRunner().invoke(app, ["train", *words, "--push_to_hub", "--hub_model_id", "me/it"])
    assert result.exit_code == 1
    assert "the hub must take the adapter, got" in result.output
    assert "upload it with `hf upload me/it" in result.output


def test_few_shots_and_fewer_examples(trained):
    assert trained(k_shot=8)[0]["train_examples"] == 16
    assert trained(max_train_samples=9)[0]["train_examples"] == 9
    assert trained(max_eval_samples=3)[0]["held_out"]["after"]["num_examples"] == 3


def test_a_bound_on_a_forward_s_tokens_changes_nothing_but_their_number(trained):
    _, whole, _ = trained()
    _, cut, _ = trained(max_tokens_per_forward=24)
    assert [s.forwards for s in whole] == [2] * 6
    assert all(s.forwards > 2 for s in cut)
    assert [s.loss for s in cut] == pytest.approx([s.loss for s in whole], rel=1e-5)


def test_lengths(trained):
    long = trained()[1]
    short = trained(max_length=4)[1]
    assert sum(s.tokens for s in short) < sum(s.tokens for s in long)
    assert trained(max_prompt_tokens=5)[0]["train_examples"] < 32


def test_the_file_s_own_order_and_a_stream_are_one(trained, data, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": r["text"], "completion": r["label"]}) + "\n" for r in rows)
    )
    more = {
        "dataset_name": path,
        "eval_data": path,
        "max_eval_samples": 5,
        "shuffle_dataset": False,
    }
    _, listed, _ = trained(**more)
    _, streamed, _ = trained(**more, streaming=True)
    assert [s.loss for s in listed] == [s.loss for s in streamed]
    assert "not shuffled" not in trained.output
    more["shuffle_dataset"] = True
    _, shuffled, _ = trained(**more)
    assert [s.loss for s in shuffled] != [s.loss for s in listed]
    trained(**more, streaming=True)
    assert "streamed come in their own order, not shuffled" in trained.output


def test_bad_rows_are_counted_and_skipped(trained, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in [*rows, {"text": None, "label": "good"}]]
    path.write_text("\n".join(lines))
    summary, _, _ = trained(dataset_name=path, on_bad_row="skip")
    assert summary["train_examples"] == 32
    assert "data: 1 rows were left out, the first one" in trained.output


def test_a_row_that_cannot_be_tokenised_is_named_before_the_engine_starts(options, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nw5 w6,zero\nw7,one\n")  # both options are unknown words
    words = [w for k, v in {**options, "dataset_name": path}.items() for w in (f"--{k}", str(v))]
    result = CliRunner().invoke(app, ["train", *words, "--batch_size", "1"])
    assert result.exit_code == 2
    assert "every example must be made of tokens, got Batch: options of prompt 0" in result.output
    assert f"({path}:2); change the row, or its wording." in result.output
    assert "Starting the" not in result.output


def test_a_dtype_reaches_the_engine(trained):
    _, single, _ = trained(eps=0.1)
    _, half, _ = trained(dtype="bfloat16", eps=0.1)
    assert [s.loss for s in half] != [s.loss for s in single]
    assert [s.loss for s in half] == pytest.approx([s.loss for s in single], rel=0.05)


def test_the_engine_gets_its_own_arguments_and_room_for_the_prompts(trained, rows, monkeypatch):
    launch, seen = ENGINES["transformers"].launch, []

    def noted(model, config, **given):
        seen.append(given)
        return launch(model, config, **given)

    monkeypatch.setattr(ENGINES["transformers"], "launch", noted)
    trained(engine_args="attn_implementation=eager")
    assert seen[0]["arguments"] == {"attn_implementation": "eager"}
    assert "cache_tokens" not in seen[0]  # an ordinary adapter's prompts change with every step
    trained(prefix="activated")
    texts = {row["text"] for row in rows}
    assert seen[1]["cache_tokens"] == sum(len(text.split()) for text in texts)


def test_an_argument_that_the_engine_does_not_have(options):
    model, data = options.pop("model_name_or_path"), options.pop("dataset_name")
    message = "engine_args must be arguments of from_pretrained, got .* 'no_such_argument'"
    with pytest.raises(ValueError, match=message):
        mezo.finetune(model, data, **options, engine_args={"no_such_argument": 1})
