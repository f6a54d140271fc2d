"""The settings of a training from names and values: command line, YAML and Python read them here.

A setting has the name of its field in `MeZOConfig` or `TrainConfig`, and those that Hugging Face's
trainers use for it. What is given goes before the task's preset, and that before the default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pydantic
import yaml

from mezo import tasks
from mezo._config_checks import column_names
from mezo._foreign_settings import ELSEWHERE, share_of, translated, without_left_out
from mezo._inputs import nearest, one_line, require, shown
from mezo.checkpoint.run_directory import TRAJECTORY
from mezo.checkpoint.trajectory import read
from mezo.config import DEFAULT_STEPS, MeZOConfig, TrainConfig
from mezo.engines.linears import all_linear

# These belong to the command that was given, not to the run.
OF_THE_COMMAND = ("output", "resume_from_checkpoint", "at", "allow_change", "overwrite_output_dir")

# The invocation of an activated adapter until the data has said what stands before its completions.
FROM_DATA = "<as the data has it>"


# How like a setting's name a misspelt one is; below, it is another one's name.
_ALIKE = 0.75


class _Once(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a name stands once in its block."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`.

        Raises:
            ConstructorError: a name stands there twice.
        """
        keys = [(k.tag, k.value) for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        twice = [key[1] for key in keys if keys.count(key) > 1 and key[1] != "<<"]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} twice", node.start_mark
            )
        block: dict[Any, Any] = super().construct_mapping(node, deep)
        return block


@cache
def fields() -> dict[str, tuple[type[Any], dataclasses.Field[Any]]]:
    """{every name of a setting: (its class, its field)}."""
    found = {}
    for cls in (TrainConfig, MeZOConfig):
        for field in dataclasses.fields(cls):
            for name in (field.name, *field.metadata["names"]):
                assert name not in found, name
                found[name] = (cls, field)
    return found


def settings_of(**given: Any) -> tuple[TrainConfig, MeZOConfig]:
    """Return the settings of a training: what is given, else the task's preset, else the default.

    Args:
        given: settings by any of their names; values may be texts, as on the command line.
            ``output`` is needed. A mapping of data columns is given as one, or as "ours=theirs".

    Raises:
        ValueError: a name that no setting has, a setting given twice, a value of another type, no
            data to train on, or what the two classes refuse.
    """
    values = _by_field(given)
    source = values.get("resume_from_checkpoint")
    if source not in (None, "auto"):
        values = {"output": Path(source), **_by_field(saved_settings(source)), **values}
    require("output" in values, "train: output_dir must be given, got none; name a directory.")
    task = values.get("task")
    require(
        task is not None or values.get("data") is not None,
        "train: data or a task must be given, got neither; pass --data FILE, or --task "
        f"{next(iter(tasks.TASKS))}.",
    )
    values = _preset(task, has_epochs=values.get("num_epochs") is not None) | values
    values = _whole_steps(values)
    if task is None and values.get("prefix") == "activated":
        values.setdefault("invocation", FROM_DATA)
    if values.get("target_modules") in (("all-linear",), ["all-linear"]):
        from mezo.tasks import assets  # of the default model

        values["target_modules"] = all_linear(
            str(values.get("model") or assets.model_dir()),
            revision=values.get("model_revision"),
            trust_remote_code=bool(values.get("trust_remote_code")),
        )
    loop = {field.name for field in dataclasses.fields(TrainConfig)}
    return (
        TrainConfig(**{name: values[name] for name in values if name in loop}),
        MeZOConfig(**{name: values[name] for name in values if name not in loop}),
    )


def _preset(task: str | None, *, has_epochs: bool) -> dict[str, Any]:
    """{field: value} that a task brings; epochs that are given go before its steps."""
    if task is None:
        return {}
    chosen = tasks.get(tasks.TASKS.check(task, "train: "))
    preset = {"name": task, "invocation": chosen.invocation, **chosen.preset}
    if has_epochs:
        preset.pop("num_steps", None)
    known = sorted({field.name for _, field in fields().values()})
    unknown = sorted(set(preset) - set(known))
    require(
        not unknown,
        f"train: the preset of task {task!r} must name fields of TrainConfig and MeZOConfig, "
        f"got {unknown}; use {known}.",
    )
    return preset


def _whole_steps(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn shares of all steps, as eval_steps 0.1, into steps; of a warm-up into its ratio."""
    found = dict(values)
    for name, value in values.items():
        share = share_of(name, value)
        if share is None:
            continue
        if name == "warmup_steps":
            require(
                not values.get("warmup_ratio"),
                "train: one of warmup_steps and warmup_ratio must be 0, got "
                f"{value} and {values.get('warmup_ratio')}; give one.",
            )
            del found[name]
            found["warmup_ratio"] = share
            continue
        num_steps = values.get("num_steps")
        require(
            num_steps is not None or values.get("num_epochs") is None,
            f"train: {name} must be whole steps where epochs are given, got {value}, a share of "
            "steps that are counted later; give max_steps, or whole steps.",
        )
        found[name] = math.ceil(share * (DEFAULT_STEPS if num_steps is None else num_steps))
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the settings of a YAML file, by the names that stand there.

    Raises:
        ValueError: it cannot be read, is no YAML, or holds something else than names and values.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Once)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"train: --config must be a YAML file, got {one_line(error)} ({path}); fix it."
        ) from error
    require(
        isinstance(content, dict) and all(isinstance(name, str) for name in content),
        f"train: {path} must hold lines as 'lr: 1.0e-3', got {shown(content)}; see docs/data.md.",
    )
    assert isinstance(content, dict)
    return content


def read_assignments(texts: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Return settings given as "name=value", values as in YAML; "a.b=value" is b inside of a.

    Args:
        texts: the assignments.
        option: what the user wrote them behind.

    Raises:
        ValueError: there is no = or no value that YAML can read.
    """
    found: dict[str, Any] = {}
    example = "lr=1e-3" if option == "--set" else "tp_size=2"
    for text in texts:
        name, equals, value = text.partition("=")
        require(
            bool(name.strip() and equals),
            f"train: {option} must be name=value, got {shown(text)}; write {option} {example}.",
        )
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"train: {option} must have a value as in YAML, got {shown(text)}; quote it."
            ) from error
        *outer, last = name.strip().split(".")
        place = found
        for part in outer:
            inner = place.setdefault(part, {})
            require(
                isinstance(inner, dict),
                f"train: {option} must not give {part!r} both as a value and as a block, got "
                f"{shown(text)}; keep one.",
            )
            place = inner
        require(
            last not in place,
            f"train: {option} must give {name.strip()} once, got {shown(text)} besides; keep one.",
        )
        place[last] = parsed
    return found


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Put settings over others, by whatever names; blocks are merged. The last one wins.

    Raises:
        ValueError: an unknown name, or a setting that one layer gives twice.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        names: dict[str, str] = {}
        for name, value in without_left_out(layer).items():
            key = _once(name, names).name
            values[key] = _merged_value(values.get(key), _block(key, name, value))
    return values


def _once(name: str, names: dict[str, str]) -> dataclasses.Field[Any]:
    """The setting of that name; ``names`` remembers {setting: the name by which it was given}."""
    field = _field(name)[1]
    require(
        field.name not in names,
        f"train: {field.name} must be given once, got {names.get(field.name)!r} and {name!r}; "
        "keep one.",
    )
    names[field.name] = name
    return field


def _merged_value(below: Any, above: Any) -> Any:
    """A value over another one; of two blocks, key by key."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {**below, **{key: _merged_value(below.get(key), above[key]) for key in above}}


def _block(field: str, name: str, value: Any) -> Any:
    """A block that was given as one text, as on the command line."""
    if not isinstance(value, str) or field not in ("columns", "engine_args"):
        return value
    if field == "columns":
        return column_names(value)
    return read_assignments(value.split(","), option=name)


def as_yaml(settings: TrainConfig, config: MeZOConfig) -> str:
    """Return settings as the YAML that gives them again.

    Those that are the default are left out, unless the task's preset would bring another value.
    """
    preset = _preset(settings.task, has_epochs=settings.num_epochs is not None)
    values = {}
    for part in (settings, config):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value != field.default or preset.get(field.name, value) != value:
                values[field.name] = _yaml_value(value)
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def saved_settings(source: str | Path) -> dict[str, Any]:
    """Return the settings of a run, without what belongs to a command.

    Args:
        source: its directory, or the trajectory in it. They are those of its run.yaml, or where
            there is none those with which the trajectory began.

    Raises:
        ValueError: there is neither, or it cannot be read.
    """
    directory = Path(source)
    directory = directory.parent if directory.name == TRAJECTORY else directory
    path = directory / "run.yaml"
    if path.is_file():
        values = read_yaml(path)
    else:
        require(
            (directory / TRAJECTORY).is_file(),
            f"train: resume_from_checkpoint must be auto or a run's directory with {TRAJECTORY}, "
            f"got {source}; pass the output of the training that was stopped.",
        )
        values = dict(read(directory / TRAJECTORY).header.settings)
    return {name: value for name, value in values.items() if name not in OF_THE_COMMAND}


def _yaml_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _by_field(given: Mapping[str, Any]) -> dict[str, Any]:
    """{field: value of the field's type}."""
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in without_left_out(given).items():
        field = _once(name, names)
        values[field.name] = _typed(fields()[field.name][0], field, name, value)
    return values


def _field(name: str) -> tuple[type[Any], dataclasses.Field[Any]]:
    """The setting of that name, in which - may stand for _."""
    key = name.replace("-", "_")
    if key in fields():
        return fields()[key]
    raise ValueError(unknown_setting(name))


def unknown_setting(name: str) -> str:
    """Say that a name is no setting's, and what to use."""
    key = name.replace("-", "_")
    near = nearest(key, fields(), alike=_ALIKE)
    remedy = ELSEWHERE.get(key) or (
        f"use {near!r}" if near else "see `mezo train --help` for all names"
    )
    return f"train: a setting must be one of mezo's, got {name!r}; {remedy}."


def _typed(cls: type[Any], field: dataclasses.Field[Any], name: str, value: Any) -> Any:
    """A value as its field's type; texts as on the command line become numbers and lists."""
    value = translated(field.name, _block(field.name, name, value))
    if (share := share_of(field.name, value)) is not None:
        return share
    if field.name in ("columns", "template", "report_to", "engine_args"):
        return value  # checked by the class
    if field.name == "target_modules" and isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if field.name == "invocation" and isinstance(value, str):
        return value
    if isinstance(value, str) and value.lower() in ("none", "null"):
        value = None
    if cls is MeZOConfig and not isinstance(value, str):
        return value  # the class says what is wrong better than a type does
    try:
        return _adapter(field.name).validate_python(value)
    except pydantic.ValidationError as error:
        kind = _hint(field.name)
        words = getattr(kind, "__name__", str(kind)).replace(" | None", "")
        raise ValueError(
            f"train: {name} must be of type {words}, got {shown(value)}; change it."
        ) from error


@cache
def _adapter(name: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(_hint(name))


@cache
def _hint(name: str) -> Any:
    return get_type_hints(fields()[name][0])[name]
