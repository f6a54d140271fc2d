"""bench.training: the table and the plot from summaries of runs."""

from __future__ import annotations

import json

import pytest

from bench import tables, training


def test_results_table_and_plot_of_summaries(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = json.loads(training.RESULTS.read_text())[:2]
    directories = []
    for i, run in enumerate(runs):
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / "summary.json").write_text(json.dumps({**run, "not_kept": 1}))
        directories.append(str(directory))
    written = []
    monkeypatch.setattr(training, "RESULTS", tmp_path / "training.json")
    monkeypatch.setattr(training, "DOCS", tmp_path)
    monkeypatch.setattr(training, "commit", lambda: "abc1234")
    monkeypatch.setattr(tables, "main", lambda: written.append(True))
    monkeypatch.setattr("sys.argv", ["training", *directories])
    training.main()
    expected = [run | {"commit": "abc1234"} for run in runs]
    assert json.loads((tmp_path / "training.json").read_text()) == expected
    assert (tmp_path / "training.png").stat().st_size > 1000
    assert written == [True]
    printed = capsys.readouterr().out
    assert "| activated, seed 0 | 0.004, 2 | 0: 0.665 (0.597) /" in printed
    assert training.text(runs).count("| activated, seed") == 2
