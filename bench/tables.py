"""The tables and figures of the documents, written from bench/results: `make tables`.

A document marks a place by `<!-- table: NAME -->` and `<!-- end of NAME -->`; what is between them
comes from a function of BLOCKS. The results' own NAME.md are written anew from NAME.json, too. A
test fails where a file differs from what is written here.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import bbc_news, records, runner, training
from bench import replay as replay_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "RECORDS.md",
    ROOT / "docs" / "first_run.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "training.md",
)
# The question behind a results file, by its name or what the name begins with.
MODULES = {
    "directions": "bench.directions",
    "e2e": "bench.e2e",
    "paired": "bench.paired",
    "perturbed_lora": "bench.experiments.lora.measure",
    "prefix_bias": "bench.prefix_bias",
    "replay": "bench.replay",
    "step": "bench.step",
}
MARK = re.compile(r"( *<!-- table: (\w+) -->\n).*?( *<!-- end of \2 -->)", re.DOTALL)


def results(name: str) -> Any:
    """The content of a results file of the CPU."""
    return json.loads((runner.RESULTS / "cpu" / f"{name}.json").read_text())


def demo() -> str:
    """What the demo's run came to; the other seeds are those of docs/training.md."""
    first, *others = [run for run in results("training") if run["config"]["prefix"] == "activated"]
    before, after = (first["held_out"][when] for when in ("before", "after"))
    seeds = " and ".join(str(run["seed"]) for run in others)
    ends = " and ".join(f"{run['held_out']['after']['accuracy']:.3f}" for run in others)
    return training.wrapped(
        f"In this run the held-out cross-entropy went from {before['cross_entropy']:.3f} to "
        f"{after['cross_entropy']:.3f} nats and the accuracy from {before['accuracy']:.3f} to "
        f"{after['accuracy']:.3f} ({after['num_examples']} test sentences, seed {first['seed']}); "
        f"seeds {seeds} end at {ends}."
    )


def step() -> str:
    """The ratios of whole steps, and where the activated one's time goes."""
    facts = results("step")
    rows = {row["name"]: row for row in facts["rows"]}
    shown = {
        "plain loop (transformers, PEFT)": "plain loop (transformers, PEFT)",
        "transformers, exact": "`transformers`, exact (padded)",
        "sglang, exact": "`sglang`, exact",
        "sglang, activated, prompts cached": "`sglang`, activated, prompts cached",
    }
    columns: dict[str, Callable[[runner.Row], object]] = {
        "step": lambda r: shown[r["name"]],
        "against the paper's loop": lambda r: f"{r['ratio']:.1f}x",
        "tokens computed": lambda r: r["tokens"] or "",
    }
    activated = rows["sglang, activated, prompts cached"]
    whole = sum(activated["parts"].values())
    percent = {part: 100 * value / whole for part, value in activated["parts"].items()}
    named = ("linear", "attention", "lora", "layers")
    rest = 100 - sum(round(percent[part]) for part in named)
    text = training.wrapped(
        f"Of the activated step {percent['linear']:.0f} % are the linear layers, "
        f"{percent['attention']:.0f} % attention, {percent['lora']:.0f} % LoRA, "
        f"{percent['layers']:.0f} % the model's other layers (norms, rotary embedding, activations "
        "and SGLang's Python between them), "
        f"{rest:.0f} % everything else, of which {percent['weights']:.0f} are perturbation and "
        "update."
    )
    table = runner.table([rows[name] for name in shown], columns)
    return f"{cpu_line(facts, 'step')}\n\n{table}\n\n{text}"


def directions() -> str:
    """The weight path against MeZO's loop, by code path."""
    facts = results("directions")
    found = {(row["what"], row["dtype"], row["path"]): row for row in facts["rows"]}
    whats = {
        "step: update, then the next pair": (
            "a step: update, then both perturbed slots (torch: 4 passes)"
        ),
        "pair: +eps and -eps of one z": "a pair of slots from one z (torch: 2 passes)",
    }
    normal = "generation: one normal (ours with its fma)"
    wanted = [(what, dtype) for what in whats for dtype in ("bfloat16", "float32")]
    wanted.append((normal, "float32"))

    def title(what: str, dtype: str) -> str:
        if what == normal:
            return "one normal, exact (torch.normal_)"
        return whats[what] if dtype == "bfloat16" else "the same"

    def ratio(row: runner.Row, path: str) -> str:
        return f"{found[row['what'], row['dtype'], path]['ratio']:.1f}x"

    columns: dict[str, Callable[[runner.Row], object]] = {
        "what, against the torch.normal loop of MeZO": lambda r: title(r["what"], r["dtype"]),
        "slots": lambda r: {"bfloat16": "bf16", "float32": "fp32"}[r["dtype"]],
        "AVX2": lambda r: ratio(r, "avx2"),
        "AVX-512": lambda r: ratio(r, "avx512"),
    }
    threads = found["threads: the same, wall-clock", "float32", "2 threads"]["ratio"]
    text = training.wrapped(
        f"Two threads are {threads:.1f}x as fast as one. The torch loop is fast here because torch "
        f"{facts['torch'].split('.')[0]}.{facts['torch'].split('.')[1]} draws normals with AVX-512."
    )
    table = runner.table([{"what": what, "dtype": dtype} for what, dtype in wanted], columns)
    return f"{cpu_line(facts, 'directions')}\n\n{table}\n\n{text}"


def replay() -> str:
    """Replay against torch.randn, and a whole run."""
    facts = results("replay")
    rows = [row for row in facts["rows"] if row["case"] == facts["rows"][-1]["case"]]
    columns: dict[str, Callable[[runner.Row], object]] = {
        "replay": lambda r: r["path"],
        "against torch.randn": lambda r: f"{r['ratio']:.1f}x",
        "ns per normal": lambda r: f"{r['ns_per_normal']:.2f}",
    }
    text = training.wrapped(
        f"{replay_of.run_text(facts['run'])} The adapter has {facts['elements']:,} elements in "
        f"{facts['tensors']} tensors."
    )
    return f"{cpu_line(facts, 'replay')}\n\n{runner.table(rows, columns)}\n\n{text}"


def cpu_line(facts: runner.Facts, name: str) -> str:
    """Where a table's numbers are from."""
    return training.wrapped(
        f"From `bench/results/cpu/{name}.json` (`python -m bench.{name}`): one thread of a CPU "
        f"({facts['cpu']}, {facts['torch_cpu_capability']}), torch {facts['torch']}, commit "
        f"{facts['commit']}, {facts['date']}."
    )


def training_runs() -> str:
    return training.text(results("training"))


def news() -> str:
    return bbc_news.text(results("bbc_news"))


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "step": step,
    "directions": directions,
    "replay": replay,
    "records": records.text,
    "training": training_runs,
    "bbc_news": news,
}


def rendered(text: str) -> str:
    """A document with its blocks written anew."""
    return MARK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def outside_blocks(text: str) -> str:
    """A document without what is written here."""
    return MARK.sub("", text)


def report_of(path: Path) -> str | None:
    """The text of NAME.md for a NAME.json; None where no question has that name."""
    for name, module in MODULES.items():
        if path.stem == name or path.stem.startswith(f"{name}_"):
            question = importlib.import_module(module).QUESTION
            return question.report(json.loads(path.read_text()))
    return None


def files() -> dict[Path, str]:
    """{path: content} of every file that `make tables` writes."""
    found = {path: rendered(path.read_text()) for path in DOCUMENTS}
    for path in sorted(runner.RESULTS.glob("*/*.json")):
        text = report_of(path)
        if text is not None:
            found[path.with_suffix(".md")] = text
    return found


def main() -> None:
    for path, text in files().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
