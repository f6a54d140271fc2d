"""The same steps by two checkouts, in turn, in one run: what a change costs.

`python -m bench.against OTHER` starts an engine from this checkout and one from OTHER (a git
worktree with its native module built), takes the steps of `bench.step` in both by turns, and prints
the other's time over ours, the median of per-round ratios. Both must give the same losses, to the
bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[1]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def serve(model_dir: str, engine_name: str) -> None:
    """Take steps on demand: a mode a line in, seconds and losses out (a process of each build)."""
    import mezo
    from mezo import tasks

    task = tasks.get("rotten_tomatoes")
    examples = task.load(None).train[:16]
    batch = mezo.Batch(
        prompts=[task.prompt(e.text) for e in examples],
        options=list(task.options),
        labels=[e.label for e in examples],
    )
    runs = {}
    for prefix in ("exact", "activated"):
        config = mezo.MeZOConfig(
            rank=8,
            target_modules=LINEARS,
            lr=1e-4,
            eps=1e-3,
            invocation=task.invocation,
            prefix=prefix,
            name=prefix,
        )
        if not runs:
            engine, tokenizer = start(model_dir, engine_name, config)
        if engine_name == "sglang" or not runs:  # a plain model holds one run
            runs[prefix] = mezo.attach(engine, config, tokenizer=tokenizer)
    print(json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        run = runs[line.strip()]
        started = time.perf_counter()
        result = run.step(batch)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "losses": result.losses}), flush=True)
    if engine_name == "sglang":
        engine.shutdown()


def start(model_dir: str, engine_name: str, config: object) -> tuple[object, object]:
    """The engine and, for a plain model, its tokenizer."""
    import mezo

    if engine_name == "sglang":
        return mezo.launch_engine(model_dir, config, max_loras_per_batch=7), None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(model_dir)


class Build:
    """A process that takes steps with the packages of one checkout."""

    def __init__(self, checkout: Path, model_dir: str, engine_name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve", model_dir, engine_name],
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.modes: list[str] = self._read()

    def _read(self) -> object:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith(("[", "{")):
                try:
                    return json.loads(line)
                except ValueError:  # a log line of the engine's
                    continue
        raise RuntimeError(f"bench.against: a build ended with {self._process.wait()}")

    def step(self, mode: str) -> dict[str, object]:
        assert self._process.stdin is not None
        self._process.stdin.write(mode + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)


def compare(ours: Build, theirs: Build, rounds: int) -> dict[str, tuple[float, float, float]]:
    """{mode: median and quartiles of their time over ours}; raises where losses differ."""
    ratios: dict[str, list[float]] = {}
    for mode in ours.modes:
        for number in range(rounds + 3):
            # Who goes first changes each round.
            pair = (ours, theirs) if number % 2 else (theirs, ours)
            results = {build: build.step(mode) for build in pair}
            if results[ours]["losses"] != results[theirs]["losses"]:
                raise RuntimeError(f"bench.against: losses of step {number}, {mode}, differ")
            if number >= 3:
                ratio = results[theirs]["seconds"] / results[ours]["seconds"]
                ratios.setdefault(mode, []).append(ratio)
    quartiles = {}
    for mode, values in ratios.items():
        values.sort()
        quartiles[mode] = (median(values), values[len(values) // 4], values[-len(values) // 4])
    return quartiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="a checkout with its module built")
    parser.add_argument("--engine", default="sglang", choices=("sglang", "transformers"))
    parser.add_argument("--model", help="default SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    from mezo.tasks import assets

    model = arguments.model or str(assets.model_dir())
    builds = [Build(path, model, arguments.engine) for path in (HERE, arguments.other.resolve())]
    try:
        for mode, (middle, low, high) in compare(*builds, arguments.rounds).items():
            print(
                f"{arguments.engine}, {mode}: the other build's step takes {middle:.3f} of ours "
                f"[{low:.3f}, {high:.3f}], {arguments.rounds} rounds, the same losses"
            )
    finally:
        for build in builds:
            build.close()


if __name__ == "__main__":
    main()
