"""The same work by two checkouts, in turn, in one run: what a change costs.

`python -m bench.against OTHER` starts an engine from this checkout and one from OTHER (a git
worktree with its native module built), runs the steps of `bench.step` in both by turns, and prints
the other's time over ours, the median of per-round ratios. `--question directions` does the same
with the kernels of `bench.directions`. Both checkouts must give the same losses, or the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.served import REPLY
from bench.timing import Timing
from bench.worker import close_input

HERE = Path(__file__).parents[1]
SERVED = Path(__file__).parent / "served.py"
WARM_UP = 3
GROUP = "sglang.srt.plugins"


def step_job(engine: str, model: str | None) -> dict[str, Any]:
    """The batch and the settings of `bench.step`, in plain values."""
    from bench.step import demo_batch, demo_settings
    from mezo.tasks import assets

    return {
        "question": "step",
        "engine": engine,
        "model": model or str(assets.model_dir()),
        "batch": demo_batch(),
        "config": demo_settings(),
    }


def directions_job(model: str) -> dict[str, Any]:
    from bench.shapes import lora_specs

    specs = [(spec.name, list(spec.shape)) for spec in lora_specs(model)]
    return {"question": "directions", "specs": specs}


def write_entry_point(checkout: Path, folder: Path) -> None:
    """Write metadata that names the plugin of a checkout, for the front of PYTHONPATH.

    SGLang finds the plugin by an entry point of an installed distribution. The installed one is
    that of a single checkout, whose module may not exist in the other.
    """
    text = (checkout / "pyproject.toml").read_text()
    found = re.search(
        rf'^\[project\.entry-points\."{re.escape(GROUP)}"\]\n(\w+) = "(.+)"', text, re.M
    )
    if found is None:
        raise SystemExit(
            f"bench.against: {checkout}/pyproject.toml names no entry point of {GROUP}"
        )
    metadata = folder / "mezo_sglang-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mezo-sglang\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{found[1]} = {found[2]}\n")


class Build:
    """A process that does the work with the packages of one checkout."""

    def __init__(self, checkout: Path, job: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        write_entry_point(checkout, Path(self._folder.name))
        path = os.pathsep.join((self._folder.name, str(checkout)))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", SERVED],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a process group, for `halt`
        )
        try:
            self.cases: list[str] = self._ask(json.dumps(job))
        except BaseException:
            self.close()
            raise

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
        while answer := self._process.stdout.readline():
            if answer.startswith(REPLY):
                return json.loads(answer.removeprefix(REPLY))
        raise RuntimeError(f"bench.against: a build ended with {self._process.wait()}")

    def run(self, case: str) -> dict[str, Any]:
        """Seconds of one call and its result."""
        return self._ask(case)

    def halt(self) -> None:
        """Stop all of its processes: an engine without work polls, and takes time from others."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process, which shuts its engine down, and remove the metadata."""
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        close_input(self._process, 120)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()


def compare(ours: Build, theirs: Build, rounds: int) -> dict[str, Timing]:
    """{case: our times, and the other's over them}; raises where results differ."""
    timings = {}
    for case in ours.cases:
        seconds, ratios = [], []
        for number in range(rounds + WARM_UP):
            # Who goes first changes each round.
            pair = (ours, theirs) if number % 2 else (theirs, ours)
            results = {}
            for build, other in (pair, pair[::-1]):
                other.halt()
                build.resume()
                results[build] = build.run(case)
            if results[ours]["result"] != results[theirs]["result"]:
                raise RuntimeError(f"bench.against: results of call {number}, {case}, differ")
            if number >= WARM_UP:
                seconds.append(results[ours]["seconds"])
                ratios.append(results[theirs]["seconds"] / seconds[-1])
        timings[case] = Timing(case, seconds, ratios)
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="a checkout with its module built")
    parser.add_argument("--question", default="step", choices=("step", "directions"))
    parser.add_argument("--engine", default="sglang", choices=("sglang", "transformers"))
    parser.add_argument(
        "--model",
        help="of step: a directory, default SmolLM2-135M-Instruct; "
        "of directions: a name of bench.shapes, default smollm2-135m",
    )
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.question == "step":
        job = step_job(arguments.engine, arguments.model)
        what = arguments.engine
    else:
        job = directions_job(arguments.model or "smollm2-135m")
        what = "directions"
    with contextlib.ExitStack() as stack:
        builds = []
        for checkout in (HERE, arguments.other.resolve()):
            builds.append(Build(checkout, job))
            stack.callback(builds[-1].close)
        for case, timing in compare(*builds, arguments.rounds).items():
            low, high = timing.ratio_p25_p75
            print(
                f"{what}, {case}: the other build takes {timing.ratio:.3f} of our time "
                f"[{low:.3f}, {high:.3f}], {arguments.rounds} rounds, the same results"
            )


if __name__ == "__main__":
    main()
