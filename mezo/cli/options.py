"""Options of a command, made from the fields of the settings, where help and default stand."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_type_hints

import typer

from mezo import tasks
from mezo.config import TrainConfig


def with_options(*settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that has ``**options`` one option for each field that has a help text.

    Their defaults are those of the default task's preset, else the fields' own.

    Args:
        settings: dataclasses such as `mezo.config.TrainConfig`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
        made = [parameter for cls in settings for parameter in _parameters(cls)]
        command.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(cls: type[Any]) -> Iterator[inspect.Parameter]:
    preset, hints = tasks.get(TrainConfig.task).preset, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        name = field.metadata["option"] or field.name
        default, kind = preset.get(field.name, field.default), hints[field.name]
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        if isinstance(default, tuple):  # a list on the command line: names with commas
            default, kind = ",".join(default), str
        option = typer.Option(f"--{name.replace('_', '-')}", help=field.metadata["help"])
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, option],
        )
