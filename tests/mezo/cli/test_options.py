"""Options of the command line: made from the settings, where help and default stand."""

from __future__ import annotations

import ast
import shlex

import pytest
import typer
from typer.testing import CliRunner

from mezo import tasks
from mezo.cli import app
from mezo.config import MeZOConfig, TrainConfig
from mezo.settings import fields, settings_of
from mezo.train import training
from tests.support.source import ROOT

COMMAND = typer.main.get_command(app).commands["train"]
OPTIONS = {p.name: p for p in COMMAND.params}
ALL = sorted({field.name for _, field in fields().values()})


@pytest.fixture
def trained(monkeypatch):
    """What the command would train with, in place of doing so."""
    seen = []

    def note(settings, config, **more):
        seen.append((settings, config))
        return None, {"problems": []}

    monkeypatch.setattr(training, "train", note)
    return seen


def run(*arguments):
    return CliRunner().invoke(app, ["train", *arguments])


@pytest.mark.parametrize("name", ALL)
def test_every_setting_is_an_option_by_all_its_names(name):
    option = OPTIONS[name]
    field = fields()[name][1]
    names = {f"--{n}" for n in (field.name, *field.metadata["names"])}
    assert names == set(option.opts)
    assert option.default is None
    assert option.help.startswith(field.metadata["help"])


def test_the_help_says_defaults_and_does_not_cut_names():
    text = run("--help").output
    for name in ("--per_device_train_batch_size", "--metric_for_best_model", "--config", "--set"):
        assert name in text
    assert "Default 0.0001." in " ".join(text.split())


@pytest.mark.parametrize("dash", ["-", "_"])
def test_names_with_dashes_and_flags_with_values(dash, trained):
    def words(text):
        return [w.replace("_", dash) if w.startswith("--") else w for w in text.split()]

    for flags, loads in (
        ("--load_best_model_at_end", True),
        ("--load_best_model_at_end True", True),
        ("--load_best_model_at_end false", False),
        ("--no_load_best_model_at_end", False),
        ("--load_best_model_at_end=True", True),
        ("--load_best_model_at_end=false", False),
        ("--no_load_best_model_at_end=false", True),
        ("--load_best_model_at_end 0", False),
    ):
        result = run(
            *words(f"--data a.csv --output_dir out --eval_steps 2 --learning_rate 1e-3 {flags}")
        )
        assert result.exit_code == 0, result.output
        settings, config = trained.pop()
        assert (config.lr, settings.eval_every, settings.load_best) == (1e-3, 2, loads)


def test_the_command_line_wins_over_the_file_and_set_over_both(trained, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: a.csv\noutput: out\nlearning_rate: 1.0e-3\nseed: 1\nrank: 4\n")
    result = run("--config", str(path), "--lr", "2e-3", "--seed", "2", "--set", "seed=3")
    assert result.exit_code == 0, result.output
    settings, config = trained.pop()
    assert (config.lr, config.seed, config.rank, settings.data) == (2e-3, 3, 4, "a.csv")


def test_values_stay_as_they_are_written(trained):
    words = ["--data", "a.csv", "--output-dir=out"]
    for value in ("--the-answer: ", "--lora-r", "--", "--a-b=c-d"):
        for given in (["--invocation", value], [f"--invocation={value}"]):
            result = run(*words, *given)
            assert result.exit_code == 0, result.output
            assert trained.pop()[1].invocation == value
    result = run(*words, "--run-name", "a-b=c-d")
    assert trained.pop()[0].run_name == "a-b=c-d", result.output


def test_blocks_of_the_file_and_of_the_command_line_are_merged(trained, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: a.csv\noutput: out\ncolumns: {text: a, label: b}\nengine_args: {x: 1, y: 2}\n"
        "eval_strategy: no\n"
    )
    result = run("--config", str(path), "--columns", "label=c", "--engine_args", "y=3")
    assert result.exit_code == 0, result.output
    settings, _ = trained.pop()
    assert settings.columns == {"text": "a", "label": "c"}
    assert settings.engine_args == {"x": 1, "y": 3}
    assert settings.eval_strategy == "no"


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--lora_dropout 0.05", {"lora_dropout": 0.05}),
        ("--lora-dropout=0.05", {"lora-dropout": 0.05}),
        ("--bf16", {"bf16": True}),
        ("--bf16 True", {"bf16": True}),
    ],
)
def test_settings_of_other_trainers_get_the_answer_that_python_gets(words, values):
    with pytest.raises(ValueError, match="a setting must be one of mezo's") as caught:
        settings_of(data="a.csv", output="out", **values)
    result = run("--data", "a.csv", "--output", "out", *words.split())
    assert result.exit_code == 2
    assert result.output.replace("_", "-") == f"error: {caught.value}\n".replace("_", "-")


@pytest.mark.parametrize("words", ["--lora_dropout 0", "--bf16 False", "--fp16=false"])
def test_what_asks_for_nothing_is_taken(words, trained):
    result = run("--data", "a.csv", *words.split(), "--output", "out")
    assert result.exit_code == 0, result.output
    assert trained.pop() == settings_of(data="a.csv", output="out")


def test_python_and_the_command_line_get_the_same_settings(trained):
    words = "--data a.csv --output out --lr 2e-3 --target-modules q_proj,v_proj "
    words += "--columns text=a,label=b"
    assert run(*words.split()).exit_code == 0
    assert trained.pop() == settings_of(
        data="a.csv",
        output_dir="out",
        learning_rate=2e-3,
        lora_target_modules=["q_proj", "v_proj"],
        columns={"text": "a", "label": "b"},
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lerning_rate 1", "--learning_rate"),
        ("--data a.csv --output out --max_steps many", "error: train: num_steps must be of type"),
        ("--load_best=often --data a.csv", "--load_best"),
        ("--data a.csv", "error: train: output_dir must be given"),
        ("--output out", "error: train: data or a task must be given"),
        ("--config nowhere.yaml", "error: train: --config must be a YAML file"),
        ("--data a.csv --output out --set lr", "error: train: --set must be name=value"),
        (
            "--data nowhere.csv --output out --engine transformers",
            "error: data: nowhere.csv must be",
        ),
    ],
)
def test_usage_errors_are_a_sentence_and_exit_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words.split())
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_no_command_states_a_default():
    """Defaults in `mezo.cli` are names of what stands elsewhere, None, or a flag that is off."""
    for path in (ROOT / "mezo" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for default in getattr(getattr(node, "args", None), "defaults", []):
                literals = [n for n in ast.walk(default) if isinstance(n, ast.Constant)]
                is_name = not isinstance(default, ast.Constant) and len(literals) <= 1
                assert is_name or ast.unparse(default) in ("None", "False"), path


def test_the_demo_gives_only_what_differs():
    makefile = (ROOT / "Makefile").read_text()
    recipe = (
        makefile[makefile.index("\ndemo:") :].split("mezo train", 1)[1].split("$(DEMO_ARGS)")[0]
    )
    words = shlex.split(recipe.replace("\\\n", " "))
    values = {w[2:].replace("-", "_"): v for w, v in zip(words[::2], words[1::2], strict=True)}
    preset = tasks.get(values["task"]).preset
    settings, config = settings_of(**values)
    for name in values.keys() - {"task", "engine", "output"}:
        field = fields()[name][1].name
        value = getattr(settings if hasattr(settings, field) else config, field)
        assert value != preset.get(field, fields()[field][1].default), name


def test_the_classes_are_the_options():
    assert {OPTIONS[name].name for name in ALL} == set(OPTIONS) - {"help", "config", "set_"}
    assert {cls for cls, _ in fields().values()} == {TrainConfig, MeZOConfig}
