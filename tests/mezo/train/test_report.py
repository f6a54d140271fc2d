from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest

from mezo.train import report
from mezo.train.report import (
    EvalPoint,
    ProgressBar,
    StepPoint,
    plot_losses,
    running_mean,
    write_json,
)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


def steps(n):
    return [StepPoint(i, 0.5 * i, 0.7 - 0.001 * i, math.sin(i)) for i in range(1, n + 1)]


def run_bar(stream, n, **kwargs):
    with ProgressBar(n, stream=stream, **kwargs) as bar:
        for step in range(kwargs.get("start", 0) + 1, n + 1):
            bar.update(step=step, seconds=0.0, loss=0.7, projected_grad=-1.25, tokens_per_s=325.4)


def test_without_a_terminal_there_is_a_plain_line_now_and_then():
    stream = io.StringIO()
    run_bar(stream, 10, every=4)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "8/10", "10/10"]
    numbers = "loss 0.7000  projected_grad -1.25  325 tokens/s  0:00 left"
    assert lines[0] == f"step  1/10  {numbers}"
    assert stream.getvalue().replace("\n", "").isprintable()


def test_a_resumed_run_starts_where_it_was():
    stream = io.StringIO()
    run_bar(stream, 10, start=6, every=100)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["7/10", "10/10"]


def test_a_terminal_gets_a_bar_and_whole_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ProgressBar(10, stream=stream) as bar:
        bar.update(step=5, seconds=0.0, loss=0.7, projected_grad=-1.25, tokens_per_s=325.4)
        bar.write("held out: [0.5]")
        bar.update(step=10, seconds=2.0, loss=0.6, projected_grad=1.25, tokens_per_s=325.4)
    text = stream.getvalue()
    assert "held out: [0.5]" in text
    assert "10/10  loss 0.6000  projected_grad +1.25  325 tokens/s  0:00 left" in text


def test_time_left_follows_the_steps_of_this_run():
    stream = io.StringIO()
    with ProgressBar(400, start=100, stream=stream) as bar:
        # 10 steps of 2 s; what else the caller did meanwhile does not count.
        bar.update(step=110, seconds=20.0, loss=0.7, projected_grad=0.0, tokens_per_s=1.0)
    assert stream.getvalue().endswith("9:40 left\n")  # 290 steps of 2 s
    assert report._duration(3723.0) == "1:02:03"


@pytest.mark.parametrize("bad", [{"total": 0}, {"every": 0}, {"start": 11}, {"start": -1}])
def test_a_bar_checks_its_numbers(bad):
    numbers = {"total": 10, "every": 5, "start": 0, **bad}
    with pytest.raises(ValueError, match="total and every must be at least 1 and start in"):
        ProgressBar(numbers.pop("total"), **numbers)


def test_running_mean_skips_what_is_not_finite():
    means = running_mean([1.0, 3.0, math.nan, math.inf, 5.0], 2)
    assert means[:3] == [1.0, 2.0, 3.0]
    assert math.isnan(means[3])
    assert means[4] == 5.0
    with pytest.raises(ValueError, match="span must be at least 1, got 0"):
        running_mean([1.0], 0)


@pytest.mark.parametrize(
    ("num_steps", "evals"),
    [
        (60, [EvalPoint(0, 0.0, 0.7, 0.5), EvalPoint(60, 30.0, 0.6, 0.8)]),  # both panels
        (60, [EvalPoint(60, 30.0, 0.6, None)]),  # a task without accuracy
        (1, []),  # shorter than the running mean
        (0, [EvalPoint(0, 0.0, math.nan, 0.5)]),
    ],
    ids=["two_panels", "one_panel", "one_step", "evals_only"],
)
def test_a_plot_is_a_png(tmp_path, num_steps, evals):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "losses.png"
    assert plot_losses(path, steps(num_steps), evals, title="title", label_text="label") == path
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 1200  # 8 inches at 150 dpi


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps or evals must hold at least one point"):
        plot_losses(tmp_path / "a.png", [], [], title="", label_text="")


def test_a_missing_matplotlib_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"pip install 'mezo-sglang\[plots\]'"):
        plot_losses(tmp_path / "a.png", steps(2), [], title="", label_text="")


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
