"""The table of RECORDS.md: one row per measured headline, made of bench/results by `make tables`.

A row is there for each device whose folder has the file. A headline that is not measured has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import runner


@dataclass(frozen=True)
class Headline:
    """What is recorded of a results file.

    Args:
        what: the row's text.
        file: name of the JSON, without its ending; a pattern, where a device has several.
        command: that measures it.
        figure: of the file's content; None where it has none.
    """

    what: str
    file: str
    command: str
    figure: Callable[[Any], str | None]


def ratio(**labels: str) -> Callable[[Any], str | None]:
    """The ratio of the row with these labels."""

    def find(facts: Any) -> str | None:
        for row in facts["rows"]:
            if all(row.get(key) == value for key, value in labels.items()) and "ratio" in row:
                return f"{row['ratio']:.1f}x"
        return None

    return find


def milliseconds(name: str) -> Callable[[Any], str | None]:
    """A step's time, and its ratio to the plain loop of the same run."""

    def find(facts: Any) -> str | None:
        for row in facts["rows"]:
            if row.get("name") == name and "seconds_p50" in row:
                return f"{1e3 * row['seconds_p50']:.1f} ms, {row['ratio']:.1f}x"
        return None

    return find


def held_out(prefix: str) -> Callable[[Any], str | None]:
    """Accuracy and cross-entropy of the first seed after training."""

    def find(runs: Any) -> str | None:
        after = next(r["held_out"]["after"] for r in runs if r["config"]["prefix"] == prefix)
        return f"accuracy {after['accuracy']:.3f}, {after['cross_entropy']:.3f} nats"

    return find


STEP = "step: update, then the next pair"
ACTIVATED = "sglang, activated, prompts cached"
HEADLINES = (
    *(
        Headline(
            f"SmolLM2-135M, 16 sentences: step of {name}, against the paper's loop",
            "step",
            "python -m bench.step",
            ratio(name=name),
        )
        for name in ("transformers, exact", "sglang, exact", ACTIVATED)
    ),
    *(
        Headline(
            f"weights of a step (update and pair, {slots} slots), {path}, against torch.normal",
            "directions",
            "python -m bench.directions",
            ratio(what=STEP, dtype=dtype, path=path),
        )
        for slots, dtype in (("bf16", "bfloat16"), ("fp32", "float32"))
        for path in ("avx2", "avx512")
    ),
    Headline(
        "the demo after 1,000 steps (activated), 400 held-out sentences, seed 0",
        "training",
        "make demo; python -m bench.training runs/demo",
        held_out("activated"),
    ),
    *(
        Headline(
            f"step of {name}, batch of 16 short prompts, against the paper's loop ({{}})",
            pattern,
            "bench/gpu/contact.sh 3",
            milliseconds(name),
        )
        for pattern in ("e2e-*", "graphs-*")
        for name in ("sglang, exact", ACTIVATED)
    ),
)


def rows() -> Iterator[runner.Row]:
    """The rows, headline by headline, device by device."""
    for headline in HEADLINES:
        for path in sorted(runner.RESULTS.glob(f"*/{headline.file}.json")):
            facts = json.loads(path.read_text())
            figure = headline.figure(facts)
            if figure is None:
                continue
            of = facts[0] if isinstance(facts, list) else facts
            yield {
                "what": headline.what.format(path.stem),
                "figure": figure,
                "device": of.get("device") or of.get("cpu") or "CPU",
                "date": of["date"][:10],
                "command": f"`{headline.command}`",
                "commit": of["commit"],
                "raw numbers": f"`{path.relative_to(runner.RESULTS.parents[1])}`",
            }


COLUMNS: dict[str, Callable[[runner.Row], object]] = {
    key: lambda r, key=key: r[key]
    for key in ("what", "figure", "device", "date", "commit", "command", "raw numbers")
}


def text() -> str:
    return runner.table(rows(), COLUMNS)
