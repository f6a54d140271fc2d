from __future__ import annotations

from pathlib import Path

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
