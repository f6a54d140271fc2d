"""`bench.against`: work of two checkouts in turn, each with its own plugin's entry point."""

from __future__ import annotations

import importlib.metadata

import pytest

from bench import against


def test_kernels_of_this_checkout_against_themselves():
    job = against.directions_job("smollm2-135m")
    job["specs"] = job["specs"][:14]
    builds = [against.Build(against.HERE, job) for _ in range(2)]
    try:
        timings = against.compare(*builds, rounds=2)
    finally:
        for build in builds:
            build.close()
    assert list(timings) == [
        "pair, bfloat16",
        "step, bfloat16",
        "pair, float32",
        "step, float32",
        "generation",
    ]
    assert all(len(timing.ratios) == 2 and timing.ratio > 0 for timing in timings.values())


class Told:
    """A build that answers what it is told."""

    cases = ("a",)

    def __init__(self, seconds, result):
        self.answer = {"seconds": seconds, "result": result}

    def halt(self):
        self.is_halted = True

    def resume(self):
        self.is_halted = False

    def run(self, case):
        assert not self.is_halted
        return self.answer


def test_ratios_are_the_others_time_over_ours_and_results_must_be_equal():
    timings = against.compare(Told(2.0, [1.5]), Told(3.0, [1.5]), rounds=4)
    assert timings["a"].ratio == 1.5
    assert timings["a"].seconds == [2.0] * 4
    with pytest.raises(RuntimeError, match="results of call 0, a, differ"):
        against.compare(Told(2.0, [1.5]), Told(2.0, [1.25]), rounds=4)


def test_a_build_that_ends_is_an_error(tmp_path):
    (tmp_path / "pyproject.toml").write_text((against.HERE / "pyproject.toml").read_text())
    build = None
    with pytest.raises(RuntimeError, match="a build ended with 1"):
        build = against.Build(tmp_path, {"question": "other"})
    assert build is None


def test_the_entry_point_is_that_of_the_checkout(tmp_path):
    checkout, folder = tmp_path / "old", tmp_path / "metadata"
    checkout.mkdir()
    folder.mkdir()
    text = '[project.entry-points."sglang.srt.plugins"]\nmezo = "mezo.old:go"\n'
    (checkout / "pyproject.toml").write_text(text)
    against.write_entry_point(checkout, folder)
    (distribution,) = importlib.metadata.distributions(path=[str(folder)])
    (entry_point,) = distribution.entry_points
    assert (entry_point.group, entry_point.name) == ("sglang.srt.plugins", "mezo")
    assert entry_point.value == "mezo.old:go"
    assert distribution.metadata["Name"] == "mezo-sglang"
    (checkout / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(SystemExit, match="no entry point of sglang"):
        against.write_entry_point(checkout, tmp_path)
