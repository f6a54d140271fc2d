"""What the docs site adds to Sphinx: tables of options, and a check that docstrings are there."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
REMARK = re.compile(r"(Cost|Graph-safe|Numerics|Source): ")


class OptionsTable(SphinxDirective):
    """The options of a verb of `mezo`, as its command line has them: ``{options} train``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        return self.parse_text_to_nodes("\n".join(rows_of(self.arguments[0])))


def rows_of(verb: str) -> list[str]:
    """Return a Markdown table of a verb's arguments and options."""
    import typer

    from mezo.cli import app

    lines = ["| option | what |", "|---|---|"]
    for parameter in typer.main.get_command(app).commands[verb].params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [str(parameter.name).upper()]
        code = ", ".join(f"`{name}`" for name in names)
        what = (parameter.help or "").replace("|", "\\|")
        lines.append(f"| {code} | {what} |")
    return lines


def read_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Warn of what has no docstring: the object and, of a module or class, its public members.

    Remarks as "Numerics: ..." become paragraphs of their own.
    """
    if not "".join(lines).strip():
        logger.warning("%s must have a docstring, got none; write one.", name, type="docstring")
    if inspect.ismodule(obj) or inspect.isclass(obj):
        for member in undocumented(obj):
            logger.warning(
                "%s.%s must have a docstring, got none; write one.", name, member, type="docstring"
            )
    lines[:] = paragraphs(lines)


def paragraphs(lines: list[str]) -> Iterator[str]:
    """Yield a docstring's lines, with remarks as paragraphs instead of hanging ones."""
    is_remark = False
    for line in lines:
        if REMARK.match(line):
            is_remark = True
            yield from ("", REMARK.sub(r"**\1:** ", line))
        elif is_remark and line[:1].strip():
            is_remark = False
            yield from ("", line)
        else:
            yield line.strip() if is_remark else line


def undocumented(owner: ModuleType | type[Any]) -> Iterator[str]:
    """Yield the public members of a module or class that no docstring says anything of."""
    if inspect.ismodule(owner):
        members = {name: getattr(owner, name) for name in getattr(owner, "__all__", vars(owner))}
        members = {name: obj for name, obj in members.items() if callable(obj)}
    else:
        members = {name: obj for name, obj in vars(owner).items() if is_method(obj)}
        text = inspect.getdoc(owner) or ""
        for field in dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ():
            if not field.name.startswith("_") and not re.search(rf"^ *{field.name}: ", text, re.M):
                yield field.name
    for name, obj in members.items():
        # A class's own: `getdoc` would also give that of what it inherits from.
        doc = vars(obj).get("__doc__") if inspect.isclass(obj) else inspect.getdoc(obj)
        if not name.startswith("_") and not doc:
            yield name


def is_method(member: Any) -> bool:
    """Whether a member of a class is a method or a property."""
    kinds = (property, classmethod, staticmethod)
    return inspect.isroutine(member) or isinstance(member, kinds)


def own_name_without_page(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Show a name of ours without a page as code; Sphinx warns of a name that is not there."""
    target = str(node.get("reftarget"))
    if not target.startswith(("mezo.", "mezo_kernels.")):
        return None
    try:
        pkgutil.resolve_name(target)
    except (AttributeError, ImportError, ValueError):
        return None
    return content


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the parts."""
    app.add_directive("options", OptionsTable)
    app.connect("autodoc-process-docstring", read_docstring, priority=100)
    app.connect("missing-reference", own_name_without_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
