"""The pages in docs/design name files, functions and variables that are there."""

from __future__ import annotations

import re

import pytest

from tests.support.source import ROOT, names_of

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
TOPS = "mezo|mezo_kernels|csrc|bench|tests|docs|examples|findings"
# `folder/`, `folder/file.py`, `folder/file.py:Class.method`
_PLACE = re.compile(rf"`((?:{TOPS})/[\w./-]*)(?::([\w.]+))?`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def places(text: str) -> list[tuple[str, str]]:
    return [(path, name) for path, name in _PLACE.findall(text) if "<" not in path]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_place_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    wrong = []
    for path, name in places(text):
        file = ROOT / path
        if not file.exists():
            wrong.append(path)
        elif name and name not in names_of(file):
            wrong.append(f"{path}:{name}")
    wrong += [link for link in _LINK.findall(text) if not (page.parent / link).exists()]
    assert not wrong


def test_places_are_found():
    text = "`mezo/run.py:Run.step` and `docs/design/` but not `mezo train` or `bench.step`"
    assert places(text) == [("mezo/run.py", "Run.step"), ("docs/design/", "")]


def test_names_are_found():
    assert {"Run", "Run.step", "attach", "logger"} <= names_of(ROOT / "mezo" / "run.py")


def test_every_room_has_its_words_on_the_start_page():
    text = (ROOT / "docs" / "design" / "index.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "mezo").rglob("__init__.py")):
        room = path.parent.relative_to(ROOT).as_posix()
        assert room == "mezo" or f"`{room}/`" in text, room


def test_the_start_page_takes_five_minutes():
    words = (ROOT / "docs" / "design" / "index.md").read_text(encoding="utf-8").split()
    assert len(words) < 1200  # at 240 words per minute
