from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mezo.checkpoint.records import JsonLines, write_json
from mezo.train.plots import StepPoint


def test_json_is_sorted_indented_and_plain(tmp_path):
    path = tmp_path / "new" / "run.json"
    data = {"b": [math.nan, 1.5], "a": StepPoint(1, 0.5, math.inf, -1.0), "c": Path("x")}
    assert write_json(path, data) == path
    text = path.read_text()
    assert text.startswith('{\n  "a": {\n    "loss": null,')
    assert text.endswith("}\n")
    assert json.loads(text)["b"] == [None, 1.5]
    assert json.loads(text)["c"] == "x"


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_json(tmp_path / "run.json", {"a": 1})
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        write_json(path, {"a": {1}})

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_log_has_one_object_per_line_and_ends_at_the_first_failure(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    log.write({"b": math.nan, "a": 1})
    assert path.read_text() == '{"b": null, "a": 1}\n'  # on the disk before the log is closed
    log.close()
    log.close()

    full = JsonLines(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device"):
        full.write({"a": 1})
    full.write({"a": 2})  # closed by now
