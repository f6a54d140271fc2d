"""docs/troubleshooting.md quotes what the code says, and has every warning of a training."""

from __future__ import annotations

import ast
import re

from tests.support.source import ROOT, python_files, tree_of

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^\| `([^`]+)` \|", TEXT, re.M)


def sentences(*folders: str) -> list[str]:
    """Every text in the code; what is filled in is "{}"."""
    found = []
    for path in python_files(*folders):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_quote_is_what_the_code_says():
    said = sentences("mezo")
    assert len(QUOTES) > 15
    assert not [quote for quote in QUOTES if not any(quote in sentence for sentence in said)]


def test_every_warning_of_a_training_is_there():
    warnings = [text for text in sentences("mezo/train/watch.py") if "; " in text and "{}" in text]
    assert len(warnings) == 6
    assert not [text for text in warnings if not any(quote in text for quote in QUOTES)]
