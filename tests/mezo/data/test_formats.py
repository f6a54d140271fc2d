from __future__ import annotations

from pathlib import Path

import pytest

from mezo.data import formats


def test_a_table_has_the_columns_and_where_each_record_stands(tmp_path):
    path = tmp_path / "data.CSV"
    path.write_text('text,label\n"two\nlines, one text",1\nNone,0\n', encoding="utf-8")
    table = formats.read(path)
    assert table.columns == ("text", "label")
    assert [record.fields for record in table.records] == [
        {"text": "two\nlines, one text", "label": "1"},
        {"text": "None", "label": "0"},
    ]
    assert [record.where for record in table.records] == [f"{path}:3", f"{path}:4"]


def test_an_empty_file_has_no_columns(tmp_path):
    path: Path = tmp_path / "data"  # a name that says nothing
    path.touch()
    assert formats.read(path) == formats.Table((), [])


@pytest.mark.parametrize("text", ['text,label\n"a" b,1\n', 'text,label\n"a,1\nb,0\n'])
def test_quotes_that_would_change_texts_are_refused(text, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data.csv:\d must be values between ',', got a line"):
        formats.read(path)


def test_columns_have_different_names(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match="columns of different names, got 'text' twice"):
        formats.read(path)


def test_only_line_breaks_end_a_line_of_text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes("a\x0c\u2028b\x85\r\n\r\nc".encode())
    found = formats.read(path)
    assert [record.fields["text"] for record in found.records] == ["a\x0c\u2028b\x85", "c"]
    assert [record.where for record in found.records] == [f"{path}:1", f"{path}:3"]
    assert list(formats.read(path, streaming=True).records) == found.records


def test_a_list_in_json_is_read_with_the_bytes_that_mark_utf_8(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('\ufeff\n[{"text": "a"}, {"label": null}]', encoding="utf-8")
    found = formats.read(path)
    assert found.columns == ("text", "label")
    assert [record.fields for record in found.records] == [
        {"text": "a", "label": None},
        {"text": None, "label": None},
    ]


def test_a_stream_keeps_what_looks_like_a_date(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "2020-01-01"}\n{"text": 5}\n')
    found = formats.read(path, streaming=True)
    assert found.columns == ("text",)
    for _ in range(2):
        assert [record.fields["text"] for record in found.records] == ["2020-01-01", 5]


def test_a_format_without_streams_says_so(tmp_path):
    class Lines:
        suffixes = (".lines",)

        def read(self, path):
            return formats.Table((), [])

    formats.FORMATS.register("lines", Lines())
    try:
        with pytest.raises(ValueError, match=r"has stream\(\), got data.lines \(lines\); leave"):
            formats.read(tmp_path / "data.lines", streaming=True)
    finally:
        formats.FORMATS.unregister("lines")
