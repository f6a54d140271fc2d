"""A training step on the CPU: the engines against the paper's loop, same model, same batch.

`python -m bench.step` prints the table and writes bench/results/cpu/step.{json,md}. The batch is 16
Rotten Tomatoes sentences with " The movie was" behind them, and the loss is that of the label word.
Each candidate runs on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mezo
from bench.timing import Timing, environment, interleave
from mezo import assets, tasks

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RESULTS = Path(__file__).parent / "results" / "cpu"
BATCH_SIZE = 16


class PlainLoop:
    """Algorithm 1 as the paper's code runs it: perturb in place by seed; four passes of z."""

    def __init__(self, model_dir: str, config: mezo.MezoConfig, batch: mezo.Batch) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        lora = LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules)
        )
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model = get_peft_model(base, lora).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.config = config
        self.seed = 0
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        rows = [
            tokenizer(prompt + str(config.invocation) + completion)["input_ids"]
            for prompt, completion in batch.pairs()
        ]
        width = max(map(len, rows))
        self.ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        self.mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        self.last = torch.tensor([len(row) - 1 for row in rows])

    def loss(self) -> float:
        logits = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        rows = torch.arange(len(self.ids))
        logprobs = logits[rows, self.last - 1].log_softmax(-1)
        return -logprobs[rows, self.ids[rows, self.last]].mean().item()

    def perturb(self, scale: float) -> None:
        torch.manual_seed(self.seed)
        for parameter in self.parameters:
            parameter.data.add_(torch.normal(0.0, 1.0, parameter.shape), alpha=scale)

    @torch.inference_mode()
    def step(self) -> None:
        self.seed += 1
        eps = self.config.eps
        self.perturb(eps)
        loss_plus = self.loss()
        self.perturb(-2 * eps)
        loss_minus = self.loss()
        self.perturb(eps)
        self.perturb(-self.config.lr * (loss_plus - loss_minus) / (2 * eps))


def measure(rounds: int) -> list[dict[str, object]]:
    """One row a candidate; the plain loop is the baseline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = tasks.get("rotten_tomatoes")
    examples = task.load(None).train[:BATCH_SIZE]
    batch = mezo.Batch(
        prompts=[task.prompt(e.text) for e in examples],
        completions=[task.options[e.label] for e in examples],
    )
    exact = mezo.MezoConfig(
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
    finally:
        engine.shutdown()
    return [row(timing, results.get(timing.name)) for timing in timings.values()]


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


def report(rows: list[dict[str, object]], where: dict[str, object]) -> str:
    lines = [
        "# A training step on the CPU",
        "",
        'The batch is 16 Rotten Tomatoes sentences with " The movie was" behind them,',
        "the loss that of the label word, SmolLM2-135M in fp32, one thread each. Ratios: the",
        "plain loop's time over the candidate's, median of per-round ratios, all in one run, in",
        "turn. Tokens: of the last step, by the engine's own count; the transformers engine pads",
        "and counts that. Weights, forward: shares of the step. Written by `python -m bench.step`.",
        "",
        "| step | ratio | tokens computed | prompt tokens reused | weights | forward |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = r["shares"]
        assert isinstance(shares, dict)
        parts = [f"{100 * shares[k]:.1f} %" if shares else "" for k in ("weights", "score")]
        numbers = ["" if r[k] is None else str(r[k]) for k in ("tokens", "reused_tokens")]
        lines.append(f"| {r['name']} | {r['ratio']:.2f} | {' | '.join([*numbers, *parts])} |")
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if key != "cpu_flags")
    return "\n".join([*lines, "", f"Measured with: {facts}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = environment()
    rows = measure(arguments.rounds)
    text = report(rows, where)
    print(text)
    if not arguments.dry_run:
        (RESULTS / "step.md").write_text(text)
        (RESULTS / "step.json").write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
