from __future__ import annotations

import io

import pytest

from mezo.train import progress
from mezo.train.progress import ProgressBar


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


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
    assert progress._duration(3723.0) == "1:02:03"


@pytest.mark.parametrize("bad", [{"total": 0}, {"every": 0}, {"start": 11}, {"start": -1}])
def test_a_bar_checks_its_numbers(bad):
    numbers = {"total": 10, "every": 5, "start": 0, **bad}
    with pytest.raises(ValueError, match="total and every must be at least 1 and start in"):
        ProgressBar(numbers.pop("total"), **numbers)
