"""The settings of a training by name: command line, YAML and Python give the same."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from mezo import tasks
from mezo.config import MeZOConfig, TrainConfig
from mezo.settings import as_yaml, fields, merged, read_assignments, read_yaml, settings_of
from tests.support.tiny import load_model

HUGGING_FACE = {  # names of Hugging Face's trainers and the fields that they are here
    "model_name_or_path": "model",
    "output_dir": "output",
    "dataset_name": "data",
    "dataset_train_split": "train_split",
    "dataset_test_split": "test_split",
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "accumulation",
    "max_steps": "num_steps",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "schedule",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "load_best_model_at_end": "load_best",
    "metric_for_best_model": "best_metric",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules",
    "shuffle_dataset": "shuffle",
    "early_stopping_patience": "patience",
}


def given(**values):
    return settings_of(**{"output": "out", "data": "rows.jsonl", **values})


@pytest.mark.parametrize(("theirs", "ours"), HUGGING_FACE.items())
def test_hugging_face_s_names_are_ours_too(theirs, ours):
    assert fields()[theirs] == fields()[ours]


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_presets_name_fields(name):
    preset = tasks.get(name).preset
    assert set(preset) <= {field.name for _, field in fields().values()}
    for field, value in preset.items():
        assert value != fields()[field][1].default, f"{field} repeats the default"


def test_defaults_are_the_fields_own():
    settings, config = given()
    assert settings == TrainConfig(output=settings.output, data="rows.jsonl")
    assert config == MeZOConfig()


def test_a_task_brings_its_preset_and_what_is_given_wins():
    settings, config = settings_of(task="rotten_tomatoes", output="out", lr="1e-3")
    assert (settings.num_steps, config.lr, config.clip) == (400, 1e-3, 3.0)
    assert (config.name, config.invocation) == ("rotten_tomatoes", " The movie was")
    settings, _ = settings_of(task="rotten_tomatoes", output="out", num_train_epochs=2)
    assert settings.num_steps is None
    assert settings.steps(100) == 12


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("rank", "4", 4),
        ("clip", "none", None),
        ("target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("load_best", "true", True),
        ("eval_every", "5", 5),
        (
            "columns",
            "prompt=question,completion=answer",
            {"prompt": "question", "completion": "answer"},
        ),
        ("report_to", "tensorboard", ("tensorboard",)),
        ("report_to", "none", ()),
        ("report_to", ["tensorboard", "wandb"], ("tensorboard", "wandb")),
        ("num_epochs", "0.5", 0.5),
        ("invocation", "none", "none"),
        ("invocation", [5, 6], (5, 6)),
        ("learning-rate", 1, 1.0),
    ],
)
def test_texts_become_values(name, text, value):
    more = {"eval_steps": 2} if name == "load_best" else {}
    settings, config = given(**{name: text}, **more)
    field = fields()[name.replace("-", "_")][1].name
    assert getattr(settings if hasattr(settings, field) else config, field) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lerning_rate": 1},
            "a setting must be one of mezo's, got 'lerning_rate'; use 'learning_rate'",
        ),
        ({"zzz": 1}, "got 'zzz'; see `mezo train --help`"),
        ({"max_grad_norm": 1}, "got 'max_grad_norm'; clip bounds projected_grad"),
        ({"lr": 1, "learning_rate": 1}, "lr must be given once, got 'lr' and 'learning_rate'"),
        ({"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ({"max_steps": "many"}, "max_steps must be of type int, got 'many'"),
        ({"max_steps": 1.5}, "max_steps must be of type int, got 1.5"),
        ({"load_best": "perhaps"}, "load_best must be of type bool, got 'perhaps'"),
        ({"task": "imdb"}, "task must be one of: .* got 'imdb'"),
        ({"output": None}, "output must be of type Path, got None"),
        ({"max_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
        ({"warmup_ratio": 2}, r"warmup_ratio must be in 0\.\.1, got 2"),
        (
            {"warmup_ratio": 0.1, "warmup_steps": 3},
            "one of warmup_steps and warmup_ratio must be 0",
        ),
        ({"num_train_epochs": 0}, "num_epochs must be a number > 0, got 0"),
        ({"eval_strategy": "often"}, "eval_strategy must be one of .* got 'often'"),
        ({"eval_strategy": "steps"}, "eval_steps must be given with eval_strategy 'steps'"),
        (
            {"eval_strategy": "epoch", "eval_steps": 3},
            "eval_steps must come with eval_strategy 'steps'",
        ),
        ({"save_strategy": "steps"}, "save_steps must be given with save_strategy 'steps'"),
        ({"save_strategy": "best"}, "save_strategy 'best' must come with evaluations"),
        ({"load_best_model_at_end": True}, "load_best must come with evaluations"),
        ({"early_stopping_patience": 2}, "patience must come with evaluations"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be one of .* got 'ignore'"),
        ({"report_to": "mlflow,wandb"}, r"report_to must be among .* got \['mlflow'\]"),
        ({"columns": "prompt"}, "columns must be pairs as prompt=question"),
        ({"columns": {"prompt": 5}}, "columns must be pairs as prompt=question"),
        ({"template": "x"}, "template must be a block of names and texts, got 'x'"),
        (
            {"task": "rotten_tomatoes", "columns": "text=a"},
            "a task must come without columns, got task 'rotten_tomatoes'",
        ),
        *(
            ({"task": "rotten_tomatoes", name: value}, f"a task must come without {name}, got")
            for name, value in {
                "template": {"prompt": "{text}"},
                "eval_data": "x.csv",
                "train_split": "a",
                "test_split": "a",
                "streaming": True,
                "on_bad_row": "skip",
                "dataset_config": "a",
                "dataset_revision": "a",
                "completion_only_loss": True,
                "assistant_only_loss": True,
                "chat_template_path": "a",
            }.items()
        ),
        ({"engine_args": ["a"]}, r"engine_args must be names and values .* got \['a'\]"),
        ({"engine_args": "tp_size"}, "engine_args must be name=value, got 'tp_size'; .* tp_size=2"),
        ({"engine_args": {"dtype": "half"}}, "leave dtype to the setting dtype, got 'half'"),
        (
            {"engine_args": "max_prefill_tokens=9"},
            "leave max_prefill_tokens to the setting max_tokens_per_forward, got 9",
        ),
        (
            {"task": "rotten_tomatoes", "columns": "text=a", "streaming": True},
            "a task must come without streaming, columns, got task 'rotten_tomatoes'",
        ),
        ({"streaming": True, "k_shot": 16}, "streaming must come without k_shot, got both"),
        (
            {"streaming": True, "max_train_samples": 9, "eval_strategy": "epoch"},
            "streaming must come without train_examples, eval_strategy 'epoch', got both",
        ),
        (
            {"streaming": True, "num_train_epochs": 2},
            "streaming must come without num_train_epochs, got both",
        ),
        (
            {"metric_for_best_model": "f1"},
            "metric_for_best_model must come with what chooses by it, got none",
        ),
        (
            {"greater_is_better": False, "eval_steps": 5},
            "greater_is_better must come with what chooses by it, got none",
        ),
        ({"hub_model_id": "me/it"}, "hub_model_id must come with push_to_hub, got 'me/it' without"),
        ({"lr_scheduler_type": "sqrt"}, "schedule must be one of: .* got 'sqrt'"),
    ],
)
def test_bad_settings_are_one_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        given(**values)


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"max_steps": -1}, "num_steps", None),
        ({"max_steps": "-1", "num_train_epochs": 2}, "num_epochs", 2.0),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, "schedule", "constant"),
        ({"eval_strategy": False}, "eval_strategy", "no"),
        ({"save_strategy": False}, "save_strategy", "no"),
        ({"eval_steps": 0.1, "max_steps": 55}, "eval_every", 6),  # as transformers: ceil
        ({"eval_steps": "0.1"}, "eval_every", 100),
        ({"save_steps": 0.5, "max_steps": 7}, "save_every", 4),
        ({"logging_steps": 0.25, "max_steps": 8}, "logging_steps", 2),
        ({"warmup_steps": 0.1, "num_train_epochs": 2}, "warmup_ratio", 0.1),
        ({"warmup_steps": 0.1, "num_train_epochs": 2}, "warmup_steps", 0),
    ],
)
def test_values_as_hugging_face_writes_them(values, field, expected):
    assert getattr(given(**values)[0], field) == expected


@pytest.mark.parametrize("none", [0, 0.0, False, None, "0", "0.0", "False", "none"])
@pytest.mark.parametrize("name", ["weight_decay", "lora_dropout", "bf16", "max-grad-norm"])
def test_what_asks_for_nothing_is_taken(name, none):
    assert given(**{name: none}) == given()
    assert merged({name: none}) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_decay": 0.01}, "got 'weight_decay'; an update moves along its directions only"),
        ({"data_seed": 3}, "got 'data_seed'; seed is that of the directions and of the data order"),
        ({"data_sort": 3}, "got 'data_sort'; see `mezo train --help`"),
        ({"do_train": False}, "got 'do_train'; mezo train trains"),
        ({"eval_steps": 0.1, "num_train_epochs": 2}, "eval_every must be whole steps where epochs"),
        ({"eval_steps": 1.5}, "eval_steps must be of type int, got 1.5"),
        ({"warmup_steps": 0.1, "warmup_ratio": 0.2}, "one of warmup_steps and warmup_ratio"),
        ({"eval_strategy": True}, "eval_strategy must be of type str, got True"),
    ],
)
def test_what_has_no_place_here_is_one_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        given(**values)


def test_a_layer_gives_a_setting_once(tmp_path):
    message = "lr must be given once, got 'lr' and 'learning_rate'; keep one"
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1.0e-3\nlearning_rate: 2.0e-3\n")
    with pytest.raises(ValueError, match=message):
        merged(read_yaml(path))
    with pytest.raises(ValueError, match=message):
        merged({"seed": 1}, read_assignments(["lr=1", "learning_rate=2"]))
    assert merged({"lr": 1}, {"learning_rate": 2}) == {"lr": 2}
    for content in ("lr: 1\nlr: 2\n", "template:\n  prompt: a\n  prompt: b\n"):
        path.write_text(content)
        name = "lr" if "lr" in content else "prompt"
        with pytest.raises(ValueError, match=f"must be a YAML file, got {name} twice .*run.yaml"):
            read_yaml(path)
    with pytest.raises(ValueError, match=r"--set must give lr once, got 'lr=2' besides"):
        read_assignments(["lr=1", "lr=2"])


def test_blocks_are_merged_however_they_are_written():
    below = {
        "columns": {"text": "a", "label": "b"},
        "engine_args": {"tp_size": 2, "page_size": 1},
        "template": {"options": {"good": " good", "bad": " bad"}, "prompt": "{a}"},
    }
    above = {
        "columns": "label=c",
        "engine_args": "tp_size=4",
        "template": {"options": {"bad": " poor"}},
    }
    for layer in (above, {**above, "columns": {"label": "c"}, "engine_args": {"tp_size": 4}}):
        assert merged(below, layer) == {
            "columns": {"text": "a", "label": "c"},
            "engine_args": {"tp_size": 4, "page_size": 1},
            "template": {"options": {"good": " good", "bad": " poor"}, "prompt": "{a}"},
        }
    assert below["columns"] == {"text": "a", "label": "b"}


def test_nothing_to_train_on_and_nowhere_to_write():
    with pytest.raises(ValueError, match="data or a task must be given, got neither"):
        settings_of(output="out")
    with pytest.raises(ValueError, match="output_dir must be given, got none"):
        settings_of(data="rows.jsonl")


def test_a_yaml_file_gives_the_same_and_the_last_layer_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: rows.jsonl\noutput_dir: out\nlearning_rate: 1e-3\nmax_steps: 5\n"
        "template:\n  prompt: '{a}'\n  completion: '{b}'\n"
    )
    values = merged(
        read_yaml(path), {"lr": "2e-3"}, read_assignments(["template.completion=' {c}'", "seed=7"])
    )
    settings, config = settings_of(**values)
    assert (config.lr, config.seed, settings.num_steps) == (2e-3, 7, 5)
    assert settings.template == {"prompt": "{a}", "completion": " {c}"}


def test_what_a_run_was_is_written_so_that_it_can_be_read_again(tmp_path):
    settings, config = given(
        lr=2e-3,
        target_modules=["q_proj"],
        columns="prompt=a,completion=b",
        report_to="wandb",
        invocation=[5, 6],
        eval_steps=3,
        load_best=True,
    )
    text = as_yaml(settings, config)
    assert set(yaml.safe_load(text)) == {
        *("output", "data", "lr", "target_modules", "columns", "report_to", "invocation"),
        *("eval_every", "load_best"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert settings_of(**read_yaml(path)) == (settings, config)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr": 1e-4, "clip": None, "num_steps": None, "batch_size": 16},
        {"num_epochs": 2},
        {"name": "mezo", "rank": 8, "schedule": "constant", "prefix": "exact"},
    ],
)
@pytest.mark.parametrize("task", ["rotten_tomatoes", "sst2", "bbc_news"])
def test_what_a_task_s_run_was_is_not_what_its_preset_says(task, values, tmp_path):
    settings, config = settings_of(task=task, output="out", **values)
    path = tmp_path / "run.yaml"
    path.write_text(as_yaml(settings, config))
    assert settings_of(**read_yaml(path)) == (settings, config)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just text", "1: 2"])
def test_a_file_that_is_no_settings_is_refused(content, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"must be a YAML file|must hold lines as 'lr: 1.0e-3'"):
        read_yaml(path)
    with pytest.raises(ValueError, match=r"must be a YAML file, got .*No such file"):
        read_yaml(tmp_path / "other.yaml")


@pytest.mark.parametrize("text", ["lr", "=3", "lr=[", "a=1"])
def test_an_assignment_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"must be name=value|must have a value|a setting must be"):
        given(**read_assignments([text]))
    with pytest.raises(ValueError, match="must not give 'a' both as a value and as a block"):
        read_assignments(["a=1", "a.b=2"])


def test_steps_of_a_training():
    def steps(count=None, **values):
        return given(batch_size=4, **values)[0].steps(count)

    assert steps() == 1000
    assert steps(num_steps=3, num_epochs=2) == 3  # as in transformers.Trainer
    assert steps(18, num_epochs=2) == 8
    assert steps(18, num_epochs=1.5) == 6
    assert steps(40, num_epochs=1, accumulation=5) == 2
    with pytest.raises(ValueError, match="max_steps must be given where data is streamed"):
        steps(None, num_epochs=1)


def test_every_field_says_what_it_is():
    for _, field in fields().values():
        assert field.metadata["help"].endswith("."), field.name
    names = [field.name for cls in (TrainConfig, MeZOConfig) for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_all_linear_is_what_peft_finds(architecture, tiny_model_dir):
    model = tiny_model_dir(architecture)
    _, config = given(model=model, target_modules="all-linear")
    peft = get_peft_model(load_model(model), LoraConfig(target_modules="all-linear"))
    found = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in peft.named_parameters()
        if ".lora_A" in name
    }
    assert set(config.target_modules) == found
    assert len(config.target_modules) == len(found)


def test_all_linear_of_no_model(tmp_path):
    with pytest.raises(ValueError, match="model must be a directory or a hub name, got"):
        given(model=str(tmp_path), lora_target_modules=["all-linear"])
