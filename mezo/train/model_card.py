"""What tells others about an adapter: its model card, and the results by usual names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mezo.checkpoint.records import write_json

# What stands for the name of data that has none.
IN_MEMORY = "in memory"


def model_card(record: dict[str, Any], run_yaml: str) -> str:
    """Return the README.md of an adapter: base model, data, scores and how to get it again.

    Args:
        record: the content of summary.json.
        run_yaml: all settings that are not the default.
    """
    head = {
        "base_model": record["model_path"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mezo", *(["alora"] if record["config"]["prefix"] == "activated" else [])],
        "metrics": [record["metric"] or "cross_entropy"],
    }
    rows = []
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    for name, value in (after or {}).items():
        if name.startswith("num_") or value is None:
            continue
        first = (before or {}).get(name)
        rows.append(f"| {name} | {_number(first)} | {_number(value)} |")
    count = after["num_examples"] if after else 0
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {record['config']['name']}",
        "",
        f"A LoRA adapter (rank {record['config']['rank']}) for {record['model']}, trained on "
        f"{record['data']} with forward passes only (MeZO, arXiv 2305.17333): {record['steps']} "
        f"steps of {record['batch_size']} examples.",
        "",
    ]
    if rows:
        lines += [
            f"| on {count} held-out examples | before | after |",
            "|---|---|---|",
            *rows,
            "",
        ]
    lines += [f"Problem: {problem}\n" for problem in record["problems"]]
    recipe = yaml.safe_load(run_yaml) or {}
    absent = [name for name in ("data", "eval_data") if recipe.get(name) == IN_MEMORY]
    for name in absent:
        del recipe[name]
    if absent:
        lines += [
            f"Its rows were in memory and stand in no file ({', '.join(absent)}). To train it",
            "again, pass them to `mezo.finetune(model, rows, ...)` with these settings, or save",
            f"them and name the files behind {' and '.join(f'`{name}:`' for name in absent)}:",
        ]
    else:
        lines += [
            "To train it again, put these lines into `run.yaml` and run",
            "`mezo train --config run.yaml`:",
        ]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    lines += [
        "",
        "```yaml",
        text.strip(),
        "```",
        "",
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
        + ".",
        "",
    ]
    return "\n".join(lines)


def write_results(output: Path, record: dict[str, Any]) -> None:
    """Write all_results.json, with the names that Hugging Face's trainers use."""
    after = record["held_out"]["after"] or {}
    names = {"cross_entropy": "loss", "num_examples": "samples"}
    results = {f"eval_{names.get(name, name)}": value for name, value in after.items()}
    seconds = record["seconds_per_step"] * record["steps"]
    results |= {
        "train_runtime": seconds,
        "train_steps": record["steps"],
        "train_samples_per_second": record["steps"] * record["batch_size"] / seconds
        if seconds
        else None,
        "num_tokens": record["tokens_computed"],
    }
    write_json(output / "all_results.json", results)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
