from __future__ import annotations

import math
import sys

import pytest

from mezo.train.plots import EvalPoint, StepPoint, plot_losses, running_mean


def steps(n):
    return [StepPoint(i, 0.5 * i, 0.7 - 0.001 * i, math.sin(i)) for i in range(1, n + 1)]


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
