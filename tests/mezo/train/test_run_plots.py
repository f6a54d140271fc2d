from __future__ import annotations

import json
import math
import sys
import time

import pytest
from typer.testing import CliRunner

from mezo.cli import app
from mezo.train.run_plots import plot_runs, read_log, thinned


def write_run(directory, num_steps=40, *, evaluations=True, shift=0.0):
    directory.mkdir(parents=True)
    with (directory / "steps.jsonl").open("w") as file:
        for i in range(num_steps):
            record = {
                "step": i,
                "loss": None if i == 3 else 0.7 + shift - 0.001 * i,
                "projected_grads": [] if i == 3 else [math.sin(i), -1.0],
                "signal_to_noise": [None, 1.5],
            }
            file.write(json.dumps(record) + "\n")
    if evaluations:
        points = [{"step": s, "loss": 0.7, "accuracy": 0.5} for s in (0, num_steps)]
        summary = {"config": {}, "evaluations": points}
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last figure: [(label, {label of a line: (xs, ys)})]."""
    pytest.importorskip("matplotlib")
    from mezo.train import run_plots

    figures, original = [], run_plots.write_png

    def write_png(figure, path):
        figures.append(figure)
        return original(figure, path)

    monkeypatch.setattr(run_plots, "write_png", write_png)

    def axes():
        return {
            axis.get_ylabel(): {line.get_label(): line.get_data() for line in axis.lines}
            for axis in figures[-1].axes
        }

    return axes


def test_panels_show_what_the_logs_say(tmp_path, drawn):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", shift=1.0, evaluations=False)
    assert plot_runs([a, b], tmp_path / "new" / "p.png") == tmp_path / "new" / "p.png"
    assert (tmp_path / "new" / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    axes = drawn()
    assert list(axes) == ["loss (nats)", "held-out accuracy", "|projected_grad|", "signal_to_noise"]
    assert set(axes["loss (nats)"]) == {"a", "a, held out", "b"}
    xs, ys = axes["loss (nats)"]["a"]
    assert list(xs) == list(range(1, 41))
    assert ys[0] == pytest.approx(0.7)
    assert ys[3] == pytest.approx(0.698)  # without the step that has no loss
    assert ys[39] == pytest.approx(0.7 - 0.0385)  # of two steps
    xs, ys = axes["|projected_grad|"]["b"]
    both = [(abs(math.sin(i)) + 1.0) / 2 for i in (10, 11)]
    assert ys[11] == pytest.approx(sum(both) / 2)
    assert set(axes["signal_to_noise"]["a"][1]) == {1.5}
    (accuracy,) = axes["held-out accuracy"].values()
    assert list(accuracy[0]) == [0, 40]


def test_panels_without_numbers_are_left_out(tmp_path, drawn):
    run = write_run(tmp_path / "a", evaluations=False)
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    for line in lines:
        line["signal_to_noise"] = [None]
    (run / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_runs([run], tmp_path / "p.png")
    assert list(drawn()) == ["loss (nats)", "|projected_grad|"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, drawn):
    runs = [write_run(tmp_path / x / "out", 2, evaluations=False) for x in "ab"]
    plot_runs(runs, tmp_path / "p.png")
    assert set(drawn()["loss (nats)"]) == {str(run) for run in runs}


def test_a_long_log_is_thinned(tmp_path, drawn):
    run = write_run(tmp_path / "long", 9_000)
    started = time.process_time()
    plot_runs([run], tmp_path / "p.png")
    assert time.process_time() - started < 20
    xs, _ = drawn()["loss (nats)"]["long"]
    assert (len(xs), xs[0], xs[-1]) == (1000, 1, 9_000)
    assert thinned(range(5), 3) == [0, 2, 4]
    assert thinned(range(3), 3) == [0, 1, 2]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "a", 3)
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [step["step"] for step in read_log(run).steps] == [0, 1, 2]
    with (run / "steps.jsonl").open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ValueError, match=r"line 4 of .*steps.jsonl must be a JSON object, got"):
        read_log(run)


def test_what_is_no_log_is_named(tmp_path):
    with pytest.raises(ValueError, match="there must be a run, got none"):
        plot_runs([], tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"steps\.jsonl must be a file, got none; pass the output"):
        plot_runs([tmp_path], tmp_path / "p.png")
    (tmp_path / "steps.jsonl").write_text("")
    with pytest.raises(ValueError, match="a line with 'step' for each step, got 0 lines; plot"):
        plot_runs([tmp_path], tmp_path / "p.png")
    (tmp_path / "steps.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="got 1 lines without it"):
        plot_runs([tmp_path], tmp_path / "p.png")


def test_the_verb_writes_a_file_or_says_why_not(tmp_path, monkeypatch):
    run, output = write_run(tmp_path / "a", 3), tmp_path / "p.png"
    result = CliRunner().invoke(app, ["plot", str(run), "--output", str(output)])
    assert (result.exit_code, result.output) == (0, f"Wrote {output}.\n")
    result = CliRunner().invoke(app, ["plot", str(tmp_path)])
    assert result.exit_code == 2
    assert "error: plot: " in result.output
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, ["plot", str(run), "--output", str(output)])
    assert result.exit_code == 1
    assert "pip install 'mezo-sglang[plots]'" in result.output
