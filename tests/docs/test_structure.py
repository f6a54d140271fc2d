"""docs/design/structure.md; that its places exist is test_design's."""

from __future__ import annotations

import re

from tests.support.source import ROOT

TEXT = (ROOT / "docs" / "design" / "structure.md").read_text()


def test_a_batch_has_nine_shapes():
    assert re.findall(r"^(\d)\. \*\*", TEXT, re.MULTILINE) == list("123456789")
