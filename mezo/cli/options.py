"""Options of a command, made from the fields of the settings, where help and default stand."""

from __future__ import annotations

import dataclasses
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mezo._foreign_settings import ELSEWHERE, is_left_out
from mezo.config import MeZOConfig, TrainConfig
from mezo.settings import unknown_setting

_PANELS = {TrainConfig: "Training", MeZOConfig: "Adapter and estimator"}
_TRUE, _FALSE = {"true", "yes", "1"}, {"false", "no", "0"}


class SettingsCommand(TyperCommand):
    """A command whose options may be written with - or _, and flags with a value: --flag True."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        by_name = {name: p for p in self.get_params(ctx) for name in (*p.opts, *p.secondary_opts)}
        found: list[str] = []
        words = deque(args)
        while words:
            name, equals, value = words.popleft().partition("=")
            is_option = name.startswith("--")
            option = f"--{name[2:].replace('-', '_')}" if is_option else name
            parameter = by_name.get(option)
            if parameter is None:
                if not is_option or not _is_left_out(option[2:], value if equals else None, words):
                    found.append(name + equals + value)
            elif not getattr(parameter, "is_flag", False):
                # The next word is the value, whatever it looks like.
                found += [option + equals + value]
                if not equals and words:
                    found.append(words.popleft())
            else:
                if not equals and words and words[0].lower() in _TRUE | _FALSE:
                    value = words.popleft()
                found.append(_flag(option, value or "true"))
        return super().parse_args(ctx, found)


def _flag(option: str, value: str) -> str:
    """A flag that was given a value; other values stay for the parser to refuse."""
    if value.lower() in _TRUE:
        return option
    if value.lower() not in _FALSE:
        return f"{option}={value}"
    return f"--{option[5:]}" if option.startswith("--no_") else f"--no_{option[2:]}"


def _is_left_out(name: str, value: str | None, words: deque[str]) -> bool:
    """Whether an option of other trainers asks for what happens anyway, as --lora_dropout 0.

    Its value is taken from the next words then. One that asks for something else ends the command
    with the sentence that YAML and Python get.
    """
    if name not in ELSEWHERE:
        return False
    is_next = value is None and bool(words) and not words[0].startswith("--")
    if is_left_out(name, words[0] if is_next else (value or "true")):
        if is_next:
            words.popleft()
        return True
    typer.echo(f"error: {unknown_setting(name)}", err=True)
    raise typer.Exit(2)


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
