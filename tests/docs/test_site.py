"""The docs site: it builds without a warning, has what it must have, and a planted fault fails."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import subprocess
import sys

import pytest

import mezo
import mezo_kernels
from mezo.config import MeZOConfig, TrainConfig
from tests.support.source import ROOT

pytestmark = pytest.mark.slow


def build(source, output, *arguments):
    """Build a site as `make docs` does, with modules beside the source; returns the process."""
    (options,) = re.findall(r"-m sphinx (.*) docs build/docs", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "sphinx", *options.split(), *arguments]
    return subprocess.run(
        [*command, str(source), str(output)],
        env=os.environ | {"PYTHONPATH": str(source.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    output = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", output)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return output


@pytest.fixture
def small_site(tmp_path):
    """Builds a site of one page, which may show a module, with the settings of ours."""

    def builds(page, module=""):
        source = tmp_path / "source"
        source.mkdir()
        (tmp_path / "planted.py").write_text(module)
        (source / "index.md").write_text(f"# Start\n\n## A heading\n\n{page}\n")
        return build(source, tmp_path / "out", "-b", "dummy", "-c", str(ROOT / "docs"))

    return builds


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_in_the_site(site):
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 20
    assert not {page for page in pages if not (site / page.with_suffix(".html")).exists()}


def test_every_public_name_is_in_the_api(site):
    api = (site / "api.html").read_text(encoding="utf-8")
    names = [f"mezo.{name}" for name in mezo.__all__]
    names += [f"mezo.Run.{name}" for name in vars(mezo.Run) if not name.startswith("_")]
    names += [f"mezo_kernels.{name}" for name in mezo_kernels.__all__]
    assert len(names) > 40
    assert not [name for name in names if f'id="{name}"' not in api]


def test_every_option_is_in_the_table_with_its_default(site):
    lines = text_of(site / "options.html").split("\n")
    lines = lines[: lines.index("mezo eval¶")]
    for cls in (TrainConfig, MeZOConfig):
        for field in dataclasses.fields(cls):
            names = ", ".join(f"--{name}" for name in (*field.metadata["names"], field.name))
            (row,) = [i for i, line in enumerate(lines) if re.match(rf"{names}(, --no_|$)", line)]
            assert field.metadata["help"] in lines[row + 1]
            if isinstance(field.default, int | float | str) and field.default is not False:
                assert lines[row + 1].endswith(f" Default {field.default}."), names


def test_the_start_page_is_the_readme(site):
    start = text_of(site / "index.html")
    assert "tokens computed" in start
    assert "mezo train --data reviews.csv" in start
    assert 'href="data.html"' in (site / "index.html").read_text()


def test_links_to_code_work_in_the_site(site):
    page = (site / "first_run.html").read_text()
    (place,) = re.findall(r'href="(_downloads/[^"]+/finetune.py)"', page)
    assert (site / place).read_text() == (ROOT / "examples" / "finetune.py").read_text()


def test_a_page_without_a_fault_builds(small_site):
    done = small_site("[here](#a-heading) and [there](index.md#start)")
    assert done.returncode == 0, done.stderr


def test_broken_links_fail(small_site):
    links = {
        "[a page](gone.md)": "'gone.md'",
        "[a file](../gone.py)": "'../gone.py'",
        "[an anchor](index.md#gone)": "not found in doc 'index': 'gone'",
        "[an anchor](#lost)": "'lost'",
        "![an image](gone.png)": "gone.png",
        "{py:func}`mezo.gone`": "target not found: mezo.gone",
    }
    done = small_site("\n\n".join(links))
    assert done.returncode == 1
    assert done.stderr.count("WARNING") == len(links)
    assert not [said for said in links.values() if said not in done.stderr], done.stderr


API = "```{eval-rst}\n.. automodule:: planted\n   :members:\n```"
MODULE = '''
"""A module."""

from dataclasses import dataclass

__all__ = ["Pair", "Thing", "call"]

def call():
    """Call; see `mezo.step`."""

class Thing:
    """A thing."""

@dataclass
class Pair:
    """A pair of `mezo.Batch`.

    Args:
        first: of both.
    """

    first: int

    def used(self):
        """Use it."""
'''


def test_a_module_without_a_fault_builds(small_site):
    done = small_site(API, MODULE)
    assert done.returncode == 0, done.stderr


def test_faults_in_docstrings_fail(small_site):
    faults = [
        ('"""Call; see `mezo.step`."""', "...", "planted.call must have a docstring"),
        ('"""A thing."""', "...", "planted.Thing must have a docstring"),
        ('"""Use it."""', "...", "planted.Pair.used must have a docstring"),
        ('"""A module."""', "", "planted must have a docstring"),
        ("first: of both.", "other: of both.", "planted.Pair.first must have a docstring"),
        ("`mezo.Batch`", "`mezo.Batches`", "target not found: mezo.Batches"),
    ]
    module = MODULE
    for there, planted, _ in faults:
        assert there in module
        module = module.replace(there, planted)
    done = small_site(API, module)
    assert done.returncode == 1
    assert done.stderr.count("WARNING") == len(faults), done.stderr
    assert not [said for *_, said in faults if said not in done.stderr], done.stderr
