"""Files, folders and data sets as rows."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import datasets
import pytest

from mezo.data.load import load_records, splits_of
from tests.support.files import write_jsonl

ROWS = [{"text": "None", "label": "001"}, {"text": "null", "label": "1e5"}]


def write_as(suffix, folder, rows=ROWS):
    path = folder / f"rows{suffix}"
    if suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".arrow":
        import pyarrow as pa

        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow"])
def test_a_file_of_each_kind_keeps_its_texts(suffix, is_streamed, tmp_path):
    path = write_as(suffix, tmp_path)
    records = load_records(path, streaming=is_streamed)
    rows = list(records.rows)
    assert [record.fields for record in rows] == ROWS
    assert records.columns == ("text", "label")
    assert all(str(path) in record.where for record in rows)
    assert splits_of(path, ("train",)) is None


def test_a_text_file_is_a_line_an_example(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("w5\n\nw6 w7\n")
    assert [(r.where, r.fields) for r in load_records(path).rows] == [
        (f"{path}:1", {"text": "w5"}),
        (f"{path}:3", {"text": "w6 w7"}),
    ]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2 must be JSON, got '{\"text\":'"):
        load_records(path)
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2 must be an object .* got \[1\]"):
        load_records(path)


@pytest.mark.parametrize("line", ["a,1,2", "a"])
def test_a_line_with_other_values_than_columns_is_named(line, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\nb,0\n{line}\n")
    with pytest.raises(
        ValueError, match=rf"rows.csv:3 must have 2 values, got {line.count(',') + 1}"
    ):
        load_records(path)


@pytest.mark.parametrize("kind", ["dict", "one"])
def test_a_folder_of_save_to_disk(kind, tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    folder = tmp_path / "saved"
    if kind == "dict":
        datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(folder)
        assert splits_of(folder, ("test", "dev")) == ("test",)
        assert [r.fields for r in load_records(folder, split="test").rows] == ROWS[1:]
        with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\] .* 'dev'"):
            load_records(folder, split="dev")
    else:
        one.save_to_disk(folder)
        assert splits_of(folder, ("test",)) is None
    assert [r.fields for r in load_records(folder).rows] == ROWS


def test_a_folder_with_a_file_per_split(tmp_path):
    write_as(".csv", tmp_path).rename(tmp_path / "train.csv")
    write_jsonl(tmp_path / "test-0001.jsonl", ROWS[:1])
    assert splits_of(tmp_path, ("dev", "test")) == ("test",)
    assert [r.fields for r in load_records(tmp_path, split="test").rows] == ROWS[:1]
    with pytest.raises(ValueError, match="must have a file for split 'dev', got"):
        load_records(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/rows.csv", "rows.csv must be a file, a folder or a hub name, got nothing there"),
        (
            "someone/some-data",
            "'someone/some-data' must be a file or folder here, or a data set on",
        ),
        (
            5,
            "the source must be a file, a folder, a hub name, a data set or a list of dicts, got 5",
        ),
    ],
)
def test_a_source_that_is_not_there(source, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        load_records(source)


def test_a_text_of_another_encoding_is_said(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nfa\xe7ade,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="must be text in UTF-8"):
        load_records(path)
    path.write_bytes(b"text\n" + b"a\n" * 10_000 + b"\xe7\n")
    rows = load_records(path, streaming=True).rows
    with pytest.raises(ValueError, match=r"rows.csv must be text in UTF-8, got .* save it as"):
        list(rows)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_all_files_of_a_split_are_read(is_streamed, tmp_path):
    for i in range(3):
        (tmp_path / f"train-0000{i}.jsonl").write_text(json.dumps({"text": f"w{i}"}) + "\n")
    (tmp_path / "training.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    rows = list(load_records(tmp_path, streaming=is_streamed).rows)
    assert [record.fields["text"] for record in rows] == ["w0", "w1", "w2"]
    assert rows[2].where == f"{tmp_path}/train-00002.jsonl:1"


def test_a_hub_name_may_have_dots(monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *_, **__: asked.append(name) or datasets.Dataset.from_list([{"text": "a"}]),
    )
    for name in ("someone/data-v2.5", "someone/v1.5-pairs"):
        assert [r.fields for r in load_records(name).rows] == [{"text": "a"}]
    assert asked == ["someone/data-v2.5", "someone/v1.5-pairs"]
    with pytest.raises(ValueError, match="got nothing there; check the path"):
        load_records("someone/data.csv")


def test_text_files_are_read_without_datasets(tmp_path):
    """Importing it takes longer than reading ten thousand rows."""
    texts = {"a.csv": "text\na\n", "a.jsonl": '{"text": "a"}\n', "a.txt": "a\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    code = (
        "import sys; from mezo.data.load import load_records; "
        f"found = [load_records({str(tmp_path)!r} + '/' + name).rows for name in {list(texts)}]; "
        "assert [[r.fields for r in rows] for rows in found] == [[{'text': 'a'}]] * 3; "
        "assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(ValueError, match=r"must be a file that can be read, .*Permission denied"):
        load_records(path)
