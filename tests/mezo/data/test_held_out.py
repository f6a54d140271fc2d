"""Rows that are held out: the same ones whatever their order, and none that is trained on."""

from __future__ import annotations

import random

from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.data.held_out import content_key, sampled, split_off


def examples_of(texts, turns=1):
    """A row for each text, in that order; returns (examples, keys)."""
    made = [
        Example(text, completion=f"{i}", where=f"row {n}")
        for n, text in enumerate(texts)
        for i in range(turns)
    ]
    keys = {
        f"row {n}": content_key(Record(f"row {n}", {"t": t}), ["t"]) for n, t in enumerate(texts)
    }
    return made, keys


def held(texts, limit=200, share=5):
    return {e.prompt for e in split_off(*examples_of(texts), limit, share)[1]}


def test_rows_are_held_out_by_what_they_say():
    texts = [f"w{i}" for i in range(500)]
    first = held(texts)
    assert len(first) == 100
    shuffled = random.Random(1).sample(texts, len(texts))
    assert held(shuffled) == first
    grown = held([*texts, "more", "and more"])
    assert len(first - grown) <= 2
    # As good as random: what comes early is no likelier than what comes late.
    assert 30 < sum(int(text[1:]) < 250 for text in first) < 70


def test_what_was_trained_on_is_never_held_out_of_a_longer_file():
    texts = [f"w{i}" for i in range(2000)]
    assert held(texts, limit=50) & set(texts[:1000]) <= held(texts[:1000], limit=50)


def test_rows_of_the_same_content_and_turns_of_a_row_stay_together():
    texts = [f"w{i % 100}" for i in range(400)]
    made, keys = examples_of(texts, turns=3)
    rest, chosen = split_off(made, keys, 81, 5)
    assert not {e.prompt for e in rest} & {e.prompt for e in chosen}
    assert len(chosen) == 80 * 3  # 81 is no number of whole groups of 4
    assert len(rest) + len(chosen) == len(made)
    assert split_off(made, keys, 3, 5)[1] == []  # no group is that small
    assert [e for e in made if e.where in {e.where for e in chosen}] == chosen


def test_labels_do_not_tell_rows_apart():
    rows = [Record("a", {"text": "w5", "label": x}) for x in (0, 1)]
    assert len({content_key(row, ["text"]) for row in rows}) == 1
    assert len({content_key(row, ["text", "label"]) for row in rows}) == 2
    assert content_key(Record("a", {"m": [{"b": 1, "a": None}]}), ["m"])


def test_a_sample_has_all_rows_or_as_many_as_asked():
    made, keys = examples_of([f"w{i}" for i in range(50)], turns=2)
    assert sampled(made, keys, 50) == (made, 50)
    chosen, count = sampled(made, keys, 10)
    assert (len(chosen), count) == (20, 50)
    assert chosen != made[:20]
    assert sampled(made, keys, 11)[0] != chosen
    assert set(map(id, chosen)) <= set(map(id, sampled(made, keys, 11)[0]))
