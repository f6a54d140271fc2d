from __future__ import annotations

import csv

import pytest

from mezo import tasks
from mezo.data.example import batch_of
from mezo.tasks import Example, assets, rotten_tomatoes


def write_csv(path, rows, columns=("text", "label", "source")):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def sentences(n):
    return [(f"sentence {i}, with a comma", i % 2, "rotten_tomatoes") for i in range(n)]


def test_the_split_is_disjoint_and_always_the_same(tmp_path):
    rows = sentences(1600)
    path = write_csv(tmp_path / "reviews.csv", rows)
    splits = rotten_tomatoes.load(path)
    sizes = [len(part) for part in (splits.train, splits.dev, splits.test)]
    assert sizes == [100, 500, 1000]
    everything = splits.train + splits.dev + splits.test
    assert {(e.prompt, e.label) for e in everything} == {(text, label) for text, label, _ in rows}
    assert rotten_tomatoes.load(path) == splits


def test_other_sources_and_duplicates_are_left_out(tmp_path):
    rows = sentences(1600)
    more = [("a review", 1, "imdb"), *rows, (rows[0][0], 1, "rotten_tomatoes")]
    plain = rotten_tomatoes.load(write_csv(tmp_path / "plain.csv", rows))
    assert rotten_tomatoes.load(write_csv(tmp_path / "more.csv", more)) == plain


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = write_csv(tmp_path / "bad.csv", [("a", 1)], columns=("text", "stars"))
    with pytest.raises(ValueError, match=r"must have the columns .* got \('text', 'stars'\)"):
        rotten_tomatoes.load(path)


def test_a_label_out_of_range_is_named_with_its_line(tmp_path):
    path = write_csv(tmp_path / "bad.csv", [("a", "2", "rotten_tomatoes")])
    with pytest.raises(ValueError, match=r"bad.csv:2 must be 0 or 1, got '2'"):
        rotten_tomatoes.load(path)


def test_too_few_sentences_are_refused(tmp_path):
    path = write_csv(tmp_path / "few.csv", sentences(1500))
    with pytest.raises(ValueError, match=r"more than 1500 distinct texts .* got 1500"):
        rotten_tomatoes.load(path)


def test_a_batch_words_the_examples():
    options = rotten_tomatoes.OPTIONS
    batch = batch_of(
        [Example("a fine film .", None, options, 1), Example("dull", None, options, 0)]
    )
    assert batch.prompts == ["a fine film .", "dull"]
    assert batch.options == [[" bad", " good"]] * 2
    assert batch.labels == [1, 0]
    assert batch.pairs()[1] == ("a fine film .", " good")


def test_a_batch_without_examples_or_with_a_strange_label_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        batch_of([])
    with pytest.raises(ValueError, match=r"labels\[0\] must name one of the 2 options"):
        batch_of([Example("a", options=rotten_tomatoes.OPTIONS, label=2)])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"must be one of: .*rotten_tomatoes.*; got 'imdb'"):
        tasks.get("imdb")


@pytest.mark.slow
def test_the_real_data_splits_as_published():
    splits = tasks.get("rotten_tomatoes").load(None)
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [7030, 500, 1000]
    everything = splits.train + splits.dev + splits.test
    assert len({e.prompt for e in everything}) == 8530
    assert sum(e.label for e in everything) == 4265
    assert rotten_tomatoes.load(assets.rotten_tomatoes_csv()) == splits
