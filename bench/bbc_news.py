"""What activated LoRA learns on long articles with five options of several tokens, and its tokens.

`python -m bench.bbc_news [OUTPUT]` trains three seeds in one SGLang engine as `mezo train` does,
then takes a few steps in exact mode for the tokens that they compute. It writes
bench/results/cpu/bbc_news.json and the table in docs/training.md. The prompts' keys and values are
the base model's: a later seed finds those of the first in the engine's cache. A seed that OUTPUT
has already is not trained again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import runner
from bench.environment import commit
from bench.training import KEPT, wrapped

RESULTS = runner.RESULTS / "cpu" / "bbc_news.json"
SEEDS = (0, 1, 2)
EXACT_STEPS = 4
COMMON: dict[str, Any] = {
    "task": "bbc_news",
    "max_length": 256,
    "train_examples": 240,
    "eval_examples": 200,
    "target_modules": "all-linear",
    "schedule": "linear",
    "eps": 1e-3,
    "clip": 2,
}


def measure(output: Path) -> list[dict[str, Any]]:
    """Train each seed, then a few exact steps; return what the summaries say."""
    # Not above: writing the tables needs none of it.
    import mezo
    from mezo.settings import settings_of
    from mezo.tasks import assets
    from mezo.train.training import train

    shapes = [
        COMMON
        | {"output": output / f"activated-{seed}", "prefix": "activated", "seed": seed}
        | {"lr": 4e-3, "steps": 300, "eval_every": 100}
        for seed in SEEDS
    ]
    shapes.append(
        COMMON | {"output": output / "exact", "steps": EXACT_STEPS, "lr": 1e-3, "eval_examples": 4}
    )
    model = str(assets.model_dir())
    settings = [settings_of(model=model, **shape) for shape in shapes]
    runs = []
    rows = COMMON["train_examples"] + COMMON["eval_examples"]
    engine = mezo.launch_engine(model, settings[0][1], cache_tokens=rows * COMMON["max_length"])
    try:
        for training, config in settings:
            summary = training.output / "summary.json"
            if not summary.exists():
                train(training, config, engine=engine)
            record = json.loads(summary.read_text())
            runs.append({key: record[key] for key in KEPT} | {"commit": commit()})
            RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    finally:
        engine.shutdown()
    return runs


def text(runs: list[dict[str, Any]]) -> str:
    """The table, and what the tokens come to."""
    *activated, exact = runs
    first = activated[0]
    lines = [
        "| seed | step: accuracy (cross-entropy) | tokens per step | prompt tokens: computed, "
        "from the cache |",
        "|---|---|---|---|",
    ]
    for run in activated:
        points = " / ".join(
            f"{e['step']}: {e['accuracy']:.3f} ({e['loss']:.3f})" for e in run["evaluations"]
        )
        lines.append(
            f"| {run['seed']} | {points} | {run['tokens_computed'] / run['steps']:.0f} | "
            f"{run['prompt_tokens_computed']:,}, {run['prompt_tokens_reused']:,} |"
        )
    per_step = sum(run["tokens_computed"] for run in activated) / sum(r["steps"] for r in activated)
    exact_step = exact["tokens_computed"] / exact["steps"]
    intro = wrapped(
        f"bbc_news: which of five topics an article of up to {COMMON['max_length']} tokens has; "
        f"options of three tokens. {first['model']}, SGLang {first['versions']['sglang']}, fp32, "
        f"activated, {first['train_examples']} training articles, "
        f"{first['held_out']['after']['num_examples']} held out, batch {first['batch_size']}, LoRA "
        f"rank {first['config']['rank']} on all linears, lr {first['config']['lr']:g}, clip "
        f"{first['config']['clip']:g}, eps {first['config']['eps']:g}, learning rate "
        f"{first['schedule']} to 0. Step 0 is zero-shot. Measured by `python -m bench.bbc_news` at "
        f"commit {first['commit']}; from `bench/results/cpu/bbc_news.json`."
    )
    ending = wrapped(
        f"A step in exact mode computes {exact_step:,.0f} tokens ({exact['steps']} steps), "
        f"{exact_step / per_step:.1f} times as many as an activated one on the mean, prompts "
        "included. A seed that trains in an engine where another has trained finds its prompts in "
        "the cache."
    )
    rows = "\n".join(lines)
    return f"{intro}\n\n{rows}\n\n{ending}"


def main() -> None:
    from bench import tables

    with tempfile.TemporaryDirectory() as temporary:
        measure(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
    tables.main()


if __name__ == "__main__":
    main()
