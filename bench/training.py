"""Tables and a plot of training runs, made from the summaries that `mezo train` writes.

`python -m bench.training DIRECTORY...` reads DIRECTORY/summary.json of each run, copies what it
needs into bench/results/cpu/training.json and writes docs/training.png and the documents' tables
(`make tables`): held-out accuracy and cross-entropy against steps and against wall time.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from bench.environment import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "training.json"
DOCS = ROOT / "docs"
KEPT = (
    "batch_size",
    "config",
    "date",
    "engine",
    "evaluations",
    "held_out",
    "max_prompt_tokens",
    "model",
    "prompt_tokens_computed",
    "prompt_tokens_reused",
    "schedule",
    "seconds_per_step",
    "seed",
    "steps",
    "task",
    "tokens_computed",
    "train_examples",
    "versions",
)


def wrapped(text: str) -> str:
    """A paragraph in lines of the width of the documents."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def label(run: dict[str, Any]) -> str:
    return f"{run['config']['prefix']}, seed {run['seed']}"


def table(runs: list[dict[str, Any]]) -> str:
    """One row per run, with its evaluations."""
    lines = [
        "| run | lr, clip | step: accuracy (cross-entropy) | minutes | tokens per step |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        points = " / ".join(
            f"{e['step']}: {e['accuracy']:.3f} ({e['loss']:.3f})" for e in run["evaluations"]
        )
        config = run["config"]
        tokens = run["tokens_computed"] / run["steps"]
        lines.append(
            f"| {label(run)} | {config['lr']:g}, {config['clip']:g} | {points} | "
            f"{run['evaluations'][-1]['seconds'] / 60:.1f} | {tokens:.0f} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for run in runs:
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "label": label(run)}
        style["color"] = "tab:blue" if run["config"]["prefix"] == "activated" else "tab:orange"
        style["linestyle"] = ("-", "--", ":")[run["seed"] % 3]
        points = run["evaluations"]
        for column, xs in enumerate(
            ([p["step"] for p in points], [p["seconds"] / 60 for p in points])
        ):
            axes[0][column].plot(xs, [p["loss"] for p in points], **style)
            axes[1][column].plot(xs, [100 * p["accuracy"] for p in points], **style)
    axes[0][0].set_ylabel("held-out cross-entropy (nats)")
    axes[1][0].set_ylabel("held-out accuracy (%)")
    axes[1][0].set_xlabel("step")
    axes[1][1].set_xlabel("minutes of training, one thread")
    for row in axes:
        for panel in row:
            panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8.5)
    figure.savefig(path)


def text(runs: list[dict[str, Any]]) -> str:
    """What the runs have in common, the table and the plot."""
    first = runs[0]
    return (
        f"{first['model']} on {first['task']}, SGLang {first['versions']['sglang']}, fp32, batch "
        f"{first['batch_size']}, LoRA rank {first['config']['rank']} on all linears, eps "
        f"{first['config']['eps']:g}, learning rate {first['schedule']} to 0, "
        f"{first['train_examples']} training sentences, "
        f"{first['held_out']['after']['num_examples']} held out; one thread on a core of its own, "
        "other work on the second core. Minutes are those of the steps, without evaluations. "
        "Measured by `python -m bench.training`, written by `make tables` from "
        "`bench/results/cpu/training.json`.\n\n"
        f"{table(runs)}\n\n"
        "![Accuracy and cross-entropy against steps and minutes](training.png)"
    )


def main() -> None:
    from bench import tables

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+")
    arguments = parser.parse_args()
    runs = []
    for directory in arguments.directories:
        summary = json.loads((directory / "summary.json").read_text())
        runs.append({key: summary[key] for key in KEPT} | {"commit": commit()})
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    plot(runs, DOCS / "training.png")
    tables.main()
    print(table(runs))


if __name__ == "__main__":
    main()
