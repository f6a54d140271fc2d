"""Each default stands in one place: a field of the settings, or a task's preset."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shlex

import pytest
import typer

import mezo
from mezo import tasks
from mezo.cli import app
from mezo.config import MeZOConfig, TrainConfig
from mezo.settings import settings_of
from tests.support.source import ROOT

FIELDS = {f.name: f for cls in (TrainConfig, MeZOConfig) for f in dataclasses.fields(cls)}
OPTIONS = {p.name: p for p in typer.main.get_command(app).commands["train"].params}
PRESET = tasks.get("rotten_tomatoes").preset


def expected_default(name):
    value = PRESET.get(name, FIELDS[name].default)
    if value is dataclasses.MISSING:
        return None
    return ",".join(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"help"}))
def test_an_option_has_the_default_of_its_field_or_of_the_preset(name):
    assert OPTIONS[name].default == expected_default(name)
    assert OPTIONS[name].required == (name == "output")
    assert OPTIONS[name].help == FIELDS[name].metadata["help"]


def test_the_command_line_of_before_is_still_there():
    names = {name for option in OPTIONS.values() for name in option.opts} - {"--help"}
    assert names == {
        *("--output", "--task", "--engine", "--model", "--data", "--steps", "--batch-size"),
        *("--lr", "--schedule", "--eps", "--clip", "--seed", "--rank", "--alpha"),
        *("--target-modules", "--num-directions", "--prefix", "--train-examples"),
        *("--max-prompt-tokens", "--eval-examples", "--eval-every", "--threads"),
    }
    assert {OPTIONS[n].default for n in ("num_steps", "lr", "eps", "clip")} == {
        400,
        3e-3,
        1e-3,
        3.0,
    }


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_presets_name_fields(name):
    preset = tasks.get(name).preset
    assert set(preset) <= set(FIELDS)
    for field, value in preset.items():
        assert value != FIELDS[field].default, f"{field} repeats the default"


def test_python_and_the_command_line_get_the_same_settings(tmp_path):
    settings, config = settings_of(output=tmp_path)
    for name, option in OPTIONS.items():
        if name in ("help", "output"):
            continue
        value = getattr(settings if hasattr(settings, name) else config, name)
        assert (",".join(value) if isinstance(value, tuple) else value) == option.default
    assert (config.name, config.invocation) == ("rotten_tomatoes", " The movie was")


def test_what_is_given_goes_before_the_preset(tmp_path):
    settings, config = settings_of(
        output=tmp_path, num_steps=3, target_modules="q_proj, v_proj", name="mine"
    )
    assert (settings.num_steps, config.target_modules) == (3, ("q_proj", "v_proj"))
    assert (config.name, config.clip) == ("mine", 3.0)


@pytest.mark.parametrize("function", [mezo.MeZOTrainer.__init__, mezo.finetune])
def test_the_loop_has_the_defaults_of_the_settings(function):
    """As expressions, too: a literal would state them twice."""
    parameters = inspect.signature(function).parameters
    source = inspect.getsource(function)
    for name in ("schedule", "eval_every"):
        assert parameters[name].default == getattr(TrainConfig, name)
        assert f" = TrainConfig.{name}," in source


def test_no_command_states_a_default():
    """Nothing in `mezo.cli` is a number or a name of a setting's value."""
    for path in (ROOT / "mezo" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for default in getattr(getattr(node, "args", None), "defaults", []):
                assert ast.unparse(default) in ("None", "TrainConfig.engine"), path


def test_the_demo_gives_only_what_differs():
    makefile = (ROOT / "Makefile").read_text()
    recipe = (
        makefile[makefile.index("\ndemo:") :].split("mezo train", 1)[1].split("$(DEMO_ARGS)")[0]
    )
    words = shlex.split(recipe.replace("\\\n", " "))
    given = dict(zip(words[::2], words[1::2], strict=True))
    flags = {option.opts[0]: option for option in OPTIONS.values()}
    for flag, value in given.items():
        option = flags[flag]
        if option.default is not None and option.name not in ("task", "engine"):
            assert type(option.default)(value) != option.default, flag
