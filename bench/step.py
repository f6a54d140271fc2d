"""A training step on the CPU: the engines against the paper's loop, same model, same batch.

`python -m bench.step` prints the tables and writes bench/results/cpu/step.*. The batch is 16 Rotten
Tomatoes sentences with " The movie was" behind them, and the loss is the cross-entropy over the two
label words. Each candidate runs on one thread.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

import mezo
from bench import runner
from bench.environment import facts_line
from bench.runner import Bench, Facts, Question, Row
from bench.step_candidates import PARTS, PaperLoop, part_shares, take_turns

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH_SIZE = 16
PLAIN = "plain loop (transformers, PEFT)"
EXACT = ("transformers, exact", "sglang, exact")
ACTIVATED = "sglang, activated, prompts cached"
# Two libraries' products in fp32 and two attentions differ by rounding.
LOSS_LIMIT = 1e-4


@dataclasses.dataclass(frozen=True)
class Demo:
    """The batch of the demo's task on a model."""

    model_dir: str
    batch: mezo.Batch
    config: mezo.MeZOConfig
    name: str = "rotten tomatoes"


class PeftLoop(PaperLoop):
    """The paper's loop on a PEFT model, one padded forward per sign."""

    def __init__(self, demo: Demo) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        config, batch = demo.config, demo.batch
        lora = LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules)
        )
        base = AutoModelForCausalLM.from_pretrained(demo.model_dir, dtype=torch.float32)
        self.model = get_peft_model(base, lora).eval()
        super().__init__([p for p in self.model.parameters() if p.requires_grad], config)
        tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
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


def demo_batch() -> dict[str, Any]:
    """The fields of the batch, in plain values."""
    from mezo.tasks import rotten_tomatoes

    examples = rotten_tomatoes.load(None).train[:BATCH_SIZE]
    return {
        "prompts": [e.prompt for e in examples],
        "options": list(rotten_tomatoes.OPTIONS),
        "labels": [e.label for e in examples],
    }


def demo_settings() -> dict[str, Any]:
    """The fields of the exact run's config, in plain values."""
    from mezo import tasks

    invocation = tasks.get("rotten_tomatoes").invocation
    return {
        "rank": 8,
        "target_modules": list(LINEARS),
        "lr": 1e-4,
        "eps": 1e-3,
        "invocation": invocation,
    }


def cases(options: runner.Options) -> list[Demo]:
    from mezo.tasks import assets

    if options.device != "cpu":
        raise SystemExit(
            "bench.step: is a question for a CPU; pass --device cpu, or use bench.e2e."
        )
    config = mezo.MeZOConfig(**demo_settings())
    return [Demo(options.model or str(assets.model_dir()), mezo.Batch(**demo_batch()), config)]


def measure(demo: Demo, bench: Bench) -> None:
    """A row for each candidate; the plain loop is the baseline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    activated = dataclasses.replace(demo.config, prefix="activated", name="activated")
    plain = PeftLoop(demo)
    model = AutoModelForCausalLM.from_pretrained(demo.model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
    engine = mezo.launch_engine(demo.model_dir, demo.config, max_loras_per_batch=7)
    try:
        runs = {
            EXACT[0]: mezo.attach(model, demo.config, tokenizer=tokenizer),
            EXACT[1]: mezo.attach(engine, demo.config),
            ACTIVATED: mezo.attach(engine, activated),
        }
        rows = take_turns({PLAIN: plain.step}, runs, demo.batch, bench.rounds, warm_up=1)
    finally:
        engine.shutdown()
    bench.rows += checked(rows, bench)


def checked(rows: list[Row], bench: Bench) -> list[Row]:
    """The rows, without the exact steps if the engines' first losses differ: those FAIL."""
    losses = [row["first_loss"] for row in rows if row["name"] in EXACT]
    if max(losses) - min(losses) <= LOSS_LIMIT:
        return rows
    for name in EXACT:
        bench.notes.append(f"FAIL {name}: first losses differ: {losses}")
    labels = {"name", "parts", "tokens", "reused_tokens"}
    return [
        {k: v for k, v in row.items() if k in labels} | {"fail": "other losses"}
        if row["name"] in EXACT
        else row
        for row in rows
    ]


def share(row: Row, part: str) -> str:
    return f"{100 * row['shares'][part]:.1f} %" if row["shares"] else ""


def count(row: Row, key: str) -> str:
    return "" if row[key] is None else str(row[key])


COLUMNS: dict[str, Callable[[Row], object]] = {
    "step": lambda r: r["name"],
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "tokens computed": lambda r: count(r, "tokens"),
    "prompt tokens reused": lambda r: count(r, "reused_tokens"),
    "weights": lambda r: share(r, "weights"),
    "forward": lambda r: share(r, "score"),
}


def parts_table(rows: list[Row]) -> str:
    columns: dict[str, Callable[[Row], object]] = {"step": lambda r: r["name"]}
    for i, part in enumerate(PARTS):
        columns[part] = lambda r, i=i: part_shares(r)[i]
    return runner.table([row for row in rows if row["parts"]], columns)


def report(facts: Facts) -> str:
    return (
        "# A training step on the CPU\n\n"
        f'The batch is {BATCH_SIZE} Rotten Tomatoes sentences with " The movie was" behind them,\n'
        "the loss that over the label words, SmolLM2-135M in fp32, one thread each. Ratios: the\n"
        "plain loop's time over the candidate's, median of per-round ratios, all in one run, in\n"
        "turn. Tokens: of the last step, by the engine's own count; the transformers engine\n"
        "shares no keys and values, pads, and counts that. Weights, forward: shares of the step.\n"
        "Written by `python -m bench.step`.\n\n"
        f"{runner.table(facts['rows'], COLUMNS)}\n\n"
        "Where an sglang step's time goes, medians under a stopwatch in the scheduler's process;\n"
        "layers: norms, rotary embedding, activations and Python between them; engine: requests,\n"
        "KV cache places, cache, batches; messages: to the scheduler and back.\n\n"
        f"{parts_table(facts['rows'])}\n\n"
        f"{runner.notes_list(facts.get('notes', ()))}{facts_line(facts)}\n"
    )


QUESTION = Question(
    name="step",
    description=__doc__,
    cases=cases,
    measure=measure,
    report=report,
    add_options=lambda parser: parser.add_argument(
        "--model", help="directory, default SmolLM2-135M-Instruct"
    ),
    rounds=8,
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
