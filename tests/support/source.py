"""What our source files import, write and contain, read by ast."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Import:
    """One imported name.

    Args:
        name: absolute and dotted, as ``mezo.core.step.run_step``.
        is_late: whether it is imported when a function runs.
        is_for_types: whether only type checkers import it.
        line: where.
    """

    name: str
    is_late: bool
    is_for_types: bool
    line: int

    @property
    def root(self) -> str:
        """The top-level package."""
        return self.name.split(".")[0]

    def is_in(self, package: str) -> bool:
        """Whether the name is a module or package, or something in it."""
        return f"{self.name}.".startswith(f"{package}.")


def python_files(*folders: str) -> list[Path]:
    """All Python files below folders (or the files themselves), sorted."""
    found = []
    for folder in folders:
        path = ROOT / folder
        found += [path] if path.suffix == ".py" else list(path.rglob("*.py"))
    return sorted(found)


def relative(path: Path) -> str:
    """A path as it is written in documents and test ids."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Everything that a file imports, anywhere in it."""
    return tuple(_imports(tree_of(path), path.relative_to(ROOT).parent.parts, False, False))


def _imports(
    node: ast.AST, package: tuple[str, ...], is_late: bool, is_for_types: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _names(child, package):
            yield Import(name, is_late, is_for_types, child.lineno)
        yield from _imports(
            child,
            package,
            is_late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
            is_for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)),
        )


def _names(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join((*parents, *([node.module] if node.module else [])))
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


# Calls that put something on the disk. `open` and `Path.open` count with a mode that writes.
_WRITERS = {
    "fsync",
    "mkstemp",
    "NamedTemporaryFile",
    "rename",
    "save",
    "save_file",
    "save_pretrained",
    "savefig",
    "write_bytes",
    "write_text",
}


def writes_of(path: Path) -> list[str]:
    """The calls in a file that write to the disk, as ``line: name``."""
    found = []
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        is_run_save = name == "save" and ast.unparse(owner or node.func) != "torch"
        is_os_replace = name == "replace" and owner is not None and ast.unparse(owner) == "os"
        is_write = name in _WRITERS and not is_run_save
        if is_write or is_os_replace or (name == "open" and _opens_to_write(node)):
            found.append(f"{node.lineno}: {name}")
    return found


def _opens_to_write(call: ast.Call) -> bool:
    # builtin open(path, mode), Path.open(mode)
    place = 0 if isinstance(call.func, ast.Attribute) else 1
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[place : place + 1]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
    return any(set("wax+") & set(str(text)) for text in texts)


def functions_of(path: Path) -> list[tuple[str, int]]:
    """Every function of a file with its number of lines, its docstring included."""
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def names_of(path: Path) -> set[str]:
    """Names that a file defines: ``function``, ``Class``, ``Class.method``, ``CONSTANT``."""
    return set(_defined(tree_of(path).body, ""))


def _defined(body: list[ast.stmt], owner: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield owner + node.name
        elif isinstance(node, ast.ClassDef):
            yield owner + node.name
            yield from _defined(node.body, f"{owner}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (owner + t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield owner + node.target.id
