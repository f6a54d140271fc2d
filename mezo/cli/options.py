"""Options of a command, made from the fields of the settings, where help and default stand."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mezo.config import MeZOConfig, TrainConfig
from mezo.settings import fields

_PANELS = {TrainConfig: "Training", MeZOConfig: "Adapter and estimator"}


class SettingsCommand(TyperCommand):
    """A command whose options may be written with - or _, and flags with a value: --flag True."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        flags = {f"--{name}" for name, (_, field) in fields().items() if is_flag(field)}
        found: list[str] = []
        for word in args:
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                word = f"{name.replace('-', '_').replace('__', '--', 1)}{equals}{value}"
            is_value = found and found[-1] in flags and not word.startswith("-")
            if is_value and word.lower() in ("true", "false"):
                found[-1] = found[-1] if word.lower() == "true" else f"--no_{found[-1][2:]}"
                continue
            found.append(word)
        return super().parse_args(ctx, found)


def is_flag(field: dataclasses.Field[Any]) -> bool:
    """Whether a setting is true or false."""
    return str(field.type).split(" |")[0] == "bool"


def with_options(*settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that has ``**options`` one option for each field of settings.

    None of them has a default of its own, so that the command knows what was given; the help shows
    the field's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
        made = [parameter for cls in settings for parameter in _parameters(cls)]
        command.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(cls: type[Any]) -> Iterator[inspect.Parameter]:
    for field in dataclasses.fields(cls):
        names = [f"--{name}" for name in (*field.metadata["names"], field.name)]
        kind: Any = str
        if is_flag(field):
            names, kind = [f"{name}/--no_{name[2:]}" for name in names], bool
        option = typer.Option(
            *dict.fromkeys(names),
            help=f"{field.metadata['help']}{_shown(field.default)}",
            metavar=None if is_flag(field) else _metavar(field),
            show_default=False,
            rich_help_panel=_PANELS[cls],
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, option],
        )


def _metavar(field: dataclasses.Field[Any]) -> str:
    kind = str(field.type).split(" |")[0].split("[")[0]
    return {"int": "INTEGER", "float": "NUMBER", "Path": "PATH"}.get(kind, "TEXT")


def _shown(default: Any) -> str:
    """A default in the help; nothing where the help text says it, or for a flag."""
    if default is False or default in (None, dataclasses.MISSING, ()):  # 0 is shown
        return ""
    return f" Default {','.join(default) if isinstance(default, tuple) else default}."
