"""Settings of the docs site: `make docs` builds it into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # this checkout's packages; site_extension.py

project = "mezo-sglang"
html_title = project
html_theme = "furo"
html_show_copyright = False
html_show_sourcelink = False
smartquotes = False  # what is copied from a page must run
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_extension"]

myst_heading_anchors = 4  # as GitHub makes them, so that a link to a heading holds in both places

# `name` in a docstring links what the site has and is code elsewhere; site_extension.py says which
# names must exist. Types of signatures are mostly those of other packages.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:obj", r"(?!mezo(_kernels)?\.).*")]

autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
