"""Which rows are held out or evaluated on: chosen by what they say, not by where they stand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from mezo.data.example import Example
from mezo.data.formats import Record


def content_key(record: Record, columns: Sequence[str]) -> str:
    """Return a hash of what a row says in some columns: as good as random, and always the same."""
    content = [record.fields.get(column) for column in columns]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def split_off(
    examples: Sequence[Example], keys: Mapping[str, str], limit: int, share: int
) -> tuple[list[Example], list[Example]]:
    """Hold rows out: those with the smallest keys, so that a file that grows keeps most of them.

    The examples of a row stay together, and so do rows of the same content.

    Args:
        examples: of all rows.
        keys: {`Example.where`: `content_key` of the row}.
        limit: the most rows to hold out.
        share: they are at most one of so many.

    Returns:
        What stays, and what is held out, both in the examples' order.
    """
    units = _rows(examples, keys)
    left = min(limit, sum(map(len, units.values())) // share)
    chosen: set[str] = set()
    for key in sorted(units):
        if len(units[key]) <= left:
            chosen.update(units[key])
            left -= len(units[key])
    return (
        [example for example in examples if example.where not in chosen],
        [example for example in examples if example.where in chosen],
    )


def sampled(
    examples: Sequence[Example], keys: Mapping[str, str], limit: int
) -> tuple[list[Example], int]:
    """Take at most ``limit`` rows, those with the smallest keys.

    Returns:
        Their examples in the file's order, and how many rows there are in all.
    """
    units = _rows(examples, keys)
    rows = [where for key in sorted(units) for where in units[key]]
    chosen = set(rows[:limit])
    return [example for example in examples if example.where in chosen], len(rows)


def _rows(examples: Sequence[Example], keys: Mapping[str, str]) -> dict[str, dict[str, None]]:
    """{key: the rows that have it}, without those that have no examples."""
    found: dict[str, dict[str, None]] = {}
    for example in examples:
        found.setdefault(keys[example.where], {})[example.where] = None
    return found
