"""How far `prefix="detached"` is from exact gradients on the demo's model and task.

`python -m bench.prefix_bias` writes bench/results/cpu/prefix_bias.*: correlation and relative error
of the projected gradients along the same directions, at the start of a training (B = 0) and at
adapter weights that have moved by a standard deviation of 0.01.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import mezo
from bench import runner
from bench.environment import facts_line
from bench.runner import Bench, Facts, Question, Row
from bench.step import LINEARS

NUM_DIRECTIONS, BATCH_SIZE = 20, 8
TARGETS = {"q, v": ("q_proj", "v_proj"), "all linears": LINEARS}
MOVED = 0.01


@dataclass(frozen=True)
class Case:
    """The modules that are trained; both states of the weights are measured on one engine."""

    name: str


def cases(options: runner.Options) -> list[Case]:
    return [Case(name) for name in TARGETS]


def batches() -> tuple[list[mezo.Batch], str]:
    """One batch per direction, and the invocation."""
    from mezo import tasks
    from mezo.data.example import batch_of

    task = tasks.get("rotten_tomatoes")
    examples = task.load(None).train[: NUM_DIRECTIONS * BATCH_SIZE]
    parts = [examples[i : i + BATCH_SIZE] for i in range(0, len(examples), BATCH_SIZE)]
    found = [batch_of(part) for part in parts]
    return found, task.invocation


def measure(case: Case, bench: Bench) -> None:
    from mezo.tasks import assets

    model_dir = str(assets.model_dir())
    found, invocation = batches()
    config = mezo.MeZOConfig(
        rank=8,
        target_modules=TARGETS[case.name],
        lr=1e-4,
        eps=1e-3,
        invocation=invocation,
        prefix="detached",
    )
    engine = mezo.launch_engine(model_dir, config)
    try:
        with mezo.attach(engine, config) as run:
            for moved in (0.0, MOVED):
                if moved:
                    run.apply_update([moved])
                bias = mezo.prefix_bias(run, found)
                bench.rows.append(
                    {
                        "targets": case.name,
                        "moved": moved,
                        "correlation": bias.correlation,
                        "relative_error": bias.relative_error,
                        "directions": len(bias.exact),
                        "batch_size": BATCH_SIZE,
                    }
                )
    finally:
        engine.shutdown()


COLUMNS: dict[str, Callable[[Row], object]] = {
    "targets": lambda r: r["targets"],
    "weights": lambda r: f"moved by {r['moved']:g}" if r["moved"] else "B = 0",
    "correlation": lambda r: f"{r['correlation']:.2f}",
    "relative error": lambda r: f"{r['relative_error']:.2f}",
}


def report(facts: Facts) -> str:
    return (
        "# Detached projected gradients against exact ones\n\n"
        f"SmolLM2-135M in fp32, LoRA r = 8, {NUM_DIRECTIONS} directions, each on a batch of "
        f"{BATCH_SIZE} Rotten Tomatoes sentences, which are detached. Written by "
        "`python -m bench.prefix_bias`.\n\n"
        f"{runner.table(facts['rows'], COLUMNS)}\n\n"
        f"{runner.notes_list(facts['notes'])}{facts_line(facts)}\n"
    )


QUESTION = Question(
    name="prefix_bias", description=__doc__, cases=cases, measure=measure, report=report
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
