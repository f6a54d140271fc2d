"""A training step on the CPU: the engines against the paper's loop, same model, same batch.

`python -m bench.step` prints the table and writes bench/results/cpu/step.{json,md}. The batch is 16
Rotten Tomatoes sentences with " The movie was" behind them, and the loss is the cross-entropy over
the two label words. Each candidate runs on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import mezo
from bench.e2e_parts import PaperLoop
from bench.timing import Timing, environment, interleave
from mezo import tasks
from mezo.core.messages import Profile
from mezo.tasks import assets

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RESULTS = Path(__file__).parent / "results" / "cpu"
BATCH_SIZE = 16


class PlainLoop(PaperLoop):
    """The paper's loop on a PEFT model, one padded forward a sign."""

    def __init__(self, model_dir: str, config: mezo.MeZOConfig, batch: mezo.Batch) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        lora = LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules)
        )
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model = get_peft_model(base, lora).eval()
        super().__init__([p for p in self.model.parameters() if p.requires_grad], config)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        rows = [tokenizer(prompt + str(config.invocation))["input_ids"] for prompt in batch.prompts]
        width = max(map(len, rows))
        self.ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        self.mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        self.last = torch.tensor([len(row) - 1 for row in rows])
        self.words = [tokenizer(o, add_special_tokens=False)["input_ids"][0] for o in batch.options]
        self.labels = torch.tensor(batch.labels)

    def loss(self) -> float:
        logits = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        scores = logits[torch.arange(len(self.ids)), self.last][:, self.words]
        return torch.nn.functional.cross_entropy(scores, self.labels).item()


def measure(rounds: int) -> tuple[list[dict[str, object]], dict[str, dict[str, float]]]:
    """One row a candidate, the plain loop is the baseline; and the parts of the sglang steps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = tasks.get("rotten_tomatoes")
    examples = task.load(None).train[:BATCH_SIZE]
    batch = mezo.Batch(
        prompts=[task.prompt(e.text) for e in examples],
        options=list(task.options),
        labels=[e.label for e in examples],
    )
    exact = mezo.MeZOConfig(
        rank=8, target_modules=LINEARS, lr=1e-4, eps=1e-3, invocation=task.invocation
    )
    activated = dataclasses.replace(exact, prefix="activated", name="activated")
    model_dir = str(assets.model_dir())
    plain = PlainLoop(model_dir, exact, batch)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    engine = mezo.launch_engine(model_dir, exact, max_loras_per_batch=7)
    try:
        runs = {
            "transformers, exact": mezo.attach(model, exact, tokenizer=tokenizer),
            "sglang, exact": mezo.attach(engine, exact),
            "sglang, activated, prompts cached": mezo.attach(engine, activated),
        }
        results: dict[str, list[mezo.StepResult]] = {name: [] for name in runs}

        def stepper(name: str) -> Callable[[], None]:
            return lambda: results[name].append(mezo.step(runs[name], batch))

        calls = {"plain loop (transformers, PEFT)": plain.step}
        calls |= {name: stepper(name) for name in runs}
        timings = interleave(calls, rounds, warm_up=1, clock=time.perf_counter)
        parts = {
            name: breakdown(run, batch, rounds)
            for name, run in runs.items()
            if name.startswith("sglang")
        }
    finally:
        engine.shutdown()
    return [row(timing, results.get(timing.name)) for timing in timings.values()], parts


def breakdown(run: mezo.Run, batch: mezo.Batch, rounds: int) -> dict[str, float]:
    """Median seconds of each part of a step, under a stopwatch in the engine."""
    samples: dict[str, list[float]] = defaultdict(list)
    request = Profile(run.name, run.request(batch))
    for _ in range(rounds):
        started = time.perf_counter()
        seconds = run.session.call(request).seconds
        seconds["messages"] = time.perf_counter() - started - sum(seconds.values())
        for part, value in seconds.items():
            samples[part].append(value)
    return {part: median(values) for part, values in samples.items()}


def row(timing: Timing, results: list[mezo.StepResult] | None) -> dict[str, object]:
    last = results[-1] if results else None
    shares = {}
    if results:
        for part in ("weights", "score"):
            values = sorted(r.timings[part] / r.timings["total"] for r in results[1:])
            shares[part] = values[len(values) // 2]
    return {
        "name": timing.name,
        "ratio": timing.ratio,
        "seconds_p50": timing.p50,
        "seconds_p20_p80": timing.p20_p80,
        "tokens": last.tokens if last else None,
        "prompt_tokens": last.prompt_tokens if last else None,
        "reused_tokens": last.reused_tokens if last else None,
        "shares": shares,
    }


PARTS = ("linear", "attention", "lora", "layers", "lm_head", "weights", "engine", "messages")


def parts_table(parts: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| step | " + " | ".join(PARTS) + " |", "|---" * (len(PARTS) + 1) + "|"]
    for name, seconds in parts.items():
        whole = sum(seconds.values())
        shares = [f"{100 * seconds.get(part, 0.0) / whole:.1f} %" for part in PARTS]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return lines


def report(
    rows: list[dict[str, object]], parts: dict[str, dict[str, float]], where: dict[str, object]
) -> str:
    lines = [
        "# A training step on the CPU",
        "",
        'The batch is 16 Rotten Tomatoes sentences with " The movie was" behind them,',
        "the loss that over the label words, SmolLM2-135M in fp32, one thread each. Ratios: the",
        "plain loop's time over the candidate's, median of per-round ratios, all in one run, in",
        "turn. Tokens: of the last step, by the engine's own count; the transformers engine shares",
        "no keys and values, pads, and counts that. Weights, forward: shares of the step.",
        "Written by `python -m bench.step`.",
        "",
        "| step | ratio | tokens computed | prompt tokens reused | weights | forward |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = r["shares"]
        assert isinstance(shares, dict)
        own = [f"{100 * shares[k]:.1f} %" if shares else "" for k in ("weights", "score")]
        numbers = ["" if r[k] is None else str(r[k]) for k in ("tokens", "reused_tokens")]
        lines.append(f"| {r['name']} | {r['ratio']:.2f} | {' | '.join([*numbers, *own])} |")
    lines += [
        "",
        "Where an sglang step's time goes, medians under a stopwatch in the scheduler's process;",
        "layers: norms, rotary embedding, activations and Python between them; engine: requests,",
        "KV slots, cache, batches; messages: to the scheduler and back.",
        "",
        *parts_table(parts),
    ]
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if key != "cpu_flags")
    return "\n".join([*lines, "", f"Measured with: {facts}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = environment()
    rows, parts = measure(arguments.rounds)
    text = report(rows, parts, where)
    print(text)
    if not arguments.dry_run:
        (RESULTS / "step.md").write_text(text)
        (RESULTS / "step.json").write_text(
            json.dumps({**where, "rows": rows, "parts": parts}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
