"""The documents' tables and figures are those of bench/results."""

from __future__ import annotations

import re

from bench import tables


def test_files_are_what_make_tables_writes():
    differing = [path.name for path, text in tables.files().items() if path.read_text() != text]
    assert differing == [], "run `make tables`"


def test_every_block_is_in_a_document():
    found = [
        name for path in tables.DOCUMENTS for _, name, _ in tables.MARK.findall(path.read_text())
    ]
    assert sorted(found) == sorted(tables.BLOCKS)


def test_a_changed_figure_is_seen():
    text = tables.DOCUMENTS[0].read_text()
    assert "4.8x" in text
    assert tables.rendered(text.replace("4.8x", "5.8x")) == text


def test_no_figure_in_readme_and_results_is_from_elsewhere():
    pages = ("README.md", "docs/first_run.md", "docs/results.md")
    text = tables.outside_blocks("".join((tables.ROOT / page).read_text() for page in pages))
    # Ratios, shares, times and fractions. Versions (0.5.17) are none.
    figure = (
        r"\d(?:\.\d+)?x\b|\d ?%|\d ?(?:ns|us|ms|GB/s)\b|(?<![\d.])0?\.\d\d+(?![\d.])|\d minutes"
    )
    assert re.findall(figure, text) == []
    assert re.findall(figure, "1.5x, 3 %, 2 ns, .39 and 0.81, but 0.5.17, 2.13.0") == [
        "1.5x",
        "3 %",
        "2 ns",
        ".39",
        "0.81",
    ]
