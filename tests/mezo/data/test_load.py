"""Where data is found, and what is loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys

import datasets
import pytest

from mezo.data.load import load_records


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


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_text_files_are_read_without_datasets(suffix, tmp_path):
    """Importing it takes longer than reading ten thousand rows."""
    path = tmp_path / f"rows{suffix}"
    path.write_text({".csv": "text\na\n", ".jsonl": '{"text": "a"}\n', ".txt": "a\n"}[suffix])
    code = (
        "import sys; from mezo.data.load import load_records; "
        f"rows = load_records({str(path)!r}).rows; assert [r.fields for r in rows] == "
        "[{'text': 'a'}]; assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
