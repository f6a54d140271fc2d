"""docs/environment.md has every environment variable that our files read, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.source import ROOT

NAME = re.compile(r"[A-Z][A-Z0-9_]+")
OURS = re.compile(r"MEZO_[A-Z0-9_]+")
# What every program has; ours only add to them for programs that they start.
EVERYONES = {"PATH", "PYTHONPATH", "TRITON_CACHE_DIR"}


def documented() -> dict[str, set[str]]:
    """{name: the files that read it}, as the tables say."""
    found = {}
    for line in (ROOT / "docs" / "environment.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert len(cells) == 5, line
            found[cells[0].strip("`")] = set(re.findall(r"`([^`]+)`", cells[4]))
    return found


def names_read_by(path: Path) -> set[str]:
    """Variables that a file reads from `os.environ`, and all others of ours that it names."""
    if path.suffix == ".sh":
        return set(re.findall(r"\$\{?(MEZO_[A-Z0-9_]+)", path.read_text()))
    tree = ast.parse(path.read_text(), filename=str(path))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    keys: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            keys += [node] if OURS.fullmatch(node.value) else []
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            keys.append(node.slice)
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            keys.append(node.left)
        elif isinstance(node, ast.Call) and re.fullmatch(
            r"os\.(environ\.(get|pop|setdefault)|getenv)", ast.unparse(node.func)
        ):
            keys.append(node.args[0])
    names = [
        key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key))
        for key in keys
    ]
    return {name for name in names if isinstance(name, str) and NAME.fullmatch(name)}


def test_the_tables_have_every_variable_and_who_reads_it():
    found: dict[str, set[str]] = {}
    files = [ROOT / "setup.py", *ROOT.glob("bench/**/*.sh")]
    for package in ("mezo", "mezo_kernels", "bench"):
        files += (ROOT / package).rglob("*.py")
    for path in files:
        for name in names_read_by(path) - EVERYONES:
            found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    assert found == documented()


def test_the_native_code_reads_none():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "getenv" not in path.read_text(), path
