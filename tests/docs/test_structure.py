"""docs/design/structure.md: every place that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "design" / "structure.md").read_text()
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))


def names_in(path: Path) -> set[str]:
    """Classes, functions, methods, properties and module variables, as `Class.method`."""
    names = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)
            if isinstance(node, ast.Assign):
                names.update(prefix + t.id for t in node.targets if isinstance(t, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return names


@pytest.mark.parametrize(("path", "name"), PLACES, ids=map(":".join, PLACES))
def test_a_place_exists(path, name):
    assert name in names_in(ROOT / path)


def test_files_without_a_function_exist_too():
    paths = set(re.findall(r"`((?:mezo|tests)/[\w/]+\.py)`", TEXT))
    assert paths
    assert {path for path in paths if not (ROOT / path).is_file()} == set()


def test_the_way_has_nine_shapes():
    assert re.findall(r"^(\d)\. \*\*", TEXT, re.MULTILINE) == list("123456789")
    assert len(PLACES) > 25


@pytest.mark.parametrize("room", ["core", "objectives", "optim"])
def test_core_knows_no_room_above_it(room):
    above = ("cli", "data", "diagnostics", "engines", "results", "run", "tasks", "train")
    for path in (ROOT / "mezo" / room).rglob("*.py"):
        text = path.read_text()
        assert not re.search(rf"^\s*(from|import) mezo\.({'|'.join(above)})\b", text, re.MULTILINE)
