"""SGLang's side is typed: how often a type may be left open."""

from __future__ import annotations

import re
from pathlib import Path

import mezo

ROOM = Path(mezo.__file__).parent / "engines" / "sglang"
LIMIT = 90


def test_any_is_the_exception():
    counts = {
        str(path.relative_to(ROOM)): len(re.findall(r"\bAny\b", path.read_text()))
        for path in ROOM.rglob("*.py")
    }
    assert sum(counts.values()) < LIMIT, {name: n for name, n in counts.items() if n}
