"""A MeZO step end to end on a GPU: the SGLang engine against plain loops, same weights' shapes.

`bench/gpu_e2e.sh WHEELS [OUT]` installs SGLang on a bare box and runs this. First the engine's
losses and projected gradients are held against a float32 forward of the same small model, for both
LoRA backends; then, for each shape, four candidates take turns in one run: the paper's loop, the
`transformers` engine, `sglang` exact and `sglang` activated. Cases that the time does not allow are
named at the end. `--dry-run` prints the cases on any host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mezo
from bench.e2e_parts import AGREEMENT_SHAPE, PlainLoop, Shape, make_batch, make_config, shapes
from bench.step import PARTS, breakdown
from bench.timing import environment, gpu_environment, interleave

PROMPTS = {"sst2": (20, 40), "long": (400, 400)}  # least and most tokens of a prompt
BATCHES = (16, 64)
LORA_BACKENDS = ("csgmv", "triton")


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    shape: Shape
    prompts: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.shape.name} b{self.batch_size} {self.prompts}"


def cases(names: list[str]) -> list[Case]:
    """All cases, the first of each shape before the second of any."""
    known = shapes()
    return [
        Case(known[name], prompts, size)
        for size in BATCHES
        for prompts in PROMPTS
        for name in names
    ]


def server_args(device: str, lora_backend: str) -> dict[str, Any]:
    """Arguments of the engine that the box needs (no FlashInfer, no grammar backend)."""
    if device == "cpu":
        return {}
    return {
        "dtype": "bfloat16",
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "lora_backend": lora_backend,
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "skip_server_warmup": True,
        "mem_fraction_static": 0.5,
    }


def launch(model_dir: str, config: mezo.MeZOConfig, device: str, lora_backend: str, **more: Any):
    args = {"skip_tokenizer_init": True, **server_args(device, lora_backend), **more}
    return mezo.launch_engine(model_dir, config, max_loras_per_batch=7, **args)


def load_hf(model_dir: str, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device).eval()


# ---------------------------------------------------------------------------------- agreement


def agreement(device: str, model_dir: str | None, directions: int) -> list[dict[str, Any]]:
    """The engine against float32 on the same weights, batches and directions.

    The gate is that of every kernel here, twice the error of the same dtype in plain PyTorch: the
    root mean square over the batches of |engine - fp32| may be at most 2 x that of the
    `transformers` engine in the device's dtype, plus one rounding of the loss to that dtype's
    relative precision (2**-9 for bfloat16) in case the latter happens to be lucky.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as directory:
        if model_dir is None:
            model_dir = directory
            torch.manual_seed(0)
            AGREEMENT_SHAPE.write(directory, with_weights=True)
        config = make_config(lr=1e-3, eps=1e-2)
        rng = random.Random(1)
        batches = [make_batch(rng, 8, (12, 40), 500) for _ in range(directions)]
        truth = pairs(load_hf(model_dir, "cpu", torch.float32), config, batches)
        plain = pairs(load_hf(model_dir, device, dtype), config, batches)
        found = []
        for lora_backend in LORA_BACKENDS if device != "cpu" else ("torch_native",):
            engine = launch(model_dir, config, device, lora_backend)
            try:
                ours = pairs(engine, config, batches)
                floors = {
                    mode: noise_floor(engine, dataclasses.replace(config, prefix=mode), batches)
                    for mode in ("exact", "activated", "detached")
                }
            finally:
                engine.shutdown()
            found.append(verdict(lora_backend, ours, plain, truth, dtype) | {"floors": floors})
    return found


def pairs(host: Any, config: mezo.MeZOConfig, batches: list[mezo.Batch]) -> torch.Tensor:
    """[batches, 3]: loss_plus, loss_minus, projected_grad."""
    rows = []
    with mezo.attach(host, config) as run:
        run.apply_update([0.3])  # away from B = 0
        for offset, batch in enumerate(batches):
            result = run.measure(run.encode(batch), offset=offset)
            rows.append([result.loss_plus, result.loss_minus, result.projected_grads[0]])
    return torch.tensor(rows, dtype=torch.float64)


def noise_floor(host: Any, config: mezo.MeZOConfig, batches: list[mezo.Batch]) -> float:
    """The largest |L+ - L-| at eps 0, over batches of several sizes; 0 where twins stay twins."""
    with mezo.attach(host, config) as run:
        run.apply_update([0.3])
        results = [
            run.pair_losses(
                dataclasses.replace(b, prompts=b.prompts[:n], completions=b.completions[:n]),
                eps=0.0,
            )
            for b in batches[:4]
            for n in (1, 3, len(b.prompts))
        ]
    return max(abs(result.loss_plus - result.loss_minus) for result in results)


def verdict(
    name: str, ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Errors of losses and projected gradients, and whether they are within the gate."""

    def rms(values: torch.Tensor) -> float:
        return math.sqrt(values.square().mean().item())

    rounding = torch.finfo(dtype).eps / 2 * truth[:, :2].abs().max().item()
    loss, plain_loss = rms((ours - truth)[:, :2]), rms((plain - truth)[:, :2])
    grad, plain_grad = rms((ours - truth)[:, 2]), rms((plain - truth)[:, 2])
    # A loss error enters the projected gradient twice, divided by 2 eps = 0.02.
    grad_rounding = rounding * math.sqrt(2) / 0.02
    return {
        "lora_backend": name,
        "loss_error": loss,
        "loss_error_pytorch": plain_loss,
        "grad_error": grad,
        "grad_error_pytorch": plain_grad,
        "grad_rms": rms(truth[:, 2]),
        "ok": loss <= 2 * plain_loss + rounding and grad <= 2 * plain_grad + grad_rounding,
    }


# -------------------------------------------------------------------------------------- speed


def measure(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: four candidates in turn."""
    rng = random.Random(case.name)
    batch = make_batch(rng, case.batch_size, PROMPTS[case.prompts], case.shape.vocab_used)
    exact = make_config(lr=1e-6, eps=1e-3, target_modules=case.shape.targets)
    activated = dataclasses.replace(exact, prefix="activated", name="activated")
    directory = tempfile.mkdtemp()
    try:
        case.shape.write(directory, with_weights=False)
        before = used_memory(device)
        tokens = 4 * (case.batch_size * (PROMPTS[case.prompts][1] + 8))
        engine = launch(
            directory,
            exact,
            device,
            LORA_BACKENDS[0],
            load_format="dummy",
            max_total_tokens=max(tokens, 16384),
            max_prefill_tokens=max(tokens, 16384),
        )
        try:
            engine_bytes = used_memory(device) - before
            rows = take_turns(case, engine, batch, (exact, activated), device, rounds)
        finally:
            engine.shutdown()
    finally:
        shutil.rmtree(directory)
    for row in rows:
        row["engine_bytes"] = engine_bytes if str(row["name"]).startswith("sglang") else None
    return rows


def take_turns(
    case: Case,
    engine: Any,
    batch: mezo.Batch,
    configs: tuple[mezo.MeZOConfig, mezo.MeZOConfig],
    device: str,
    rounds: int,
) -> list[dict[str, Any]]:
    """Interleave the candidates on one engine and one Hugging Face model."""
    exact, activated = configs
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    model = case.shape.random_model(device)
    runs = {
        "transformers, exact": mezo.attach(model, exact),
        "sglang, exact": mezo.attach(engine, exact),
        "sglang, activated, prompts cached": mezo.attach(engine, activated),
    }
    plain = PlainLoop(runs["transformers, exact"], batch)
    results: dict[str, list[mezo.StepResult]] = {name: [] for name in runs}

    def stepper(name: str) -> Callable[[], None]:
        return lambda: results[name].append(mezo.step(runs[name], batch))

    calls = {"plain loop": plain.step, **{name: stepper(name) for name in runs}}
    timings = interleave(calls, rounds, warm_up=2, clock=time.perf_counter)
    rows = []
    for name, timing in timings.items():
        last = results[name][-1] if name in results else None
        parts = breakdown(runs[name], batch, rounds) if name.startswith("sglang") else {}
        rows.append(
            {
                "case": case.name,
                "name": name,
                "ratio": timing.ratio,
                "seconds_p50": timing.p50,
                "seconds_p20_p80": timing.p20_p80,
                "tokens": last.tokens if last else None,
                "reused_tokens": last.reused_tokens if last else None,
                "parts": parts,
                "torch_peak_bytes": None if device == "cpu" else torch.cuda.max_memory_allocated(),
            }
        )
    for run in runs.values():
        run.close()
    return rows


def used_memory(device: str) -> int:
    """Bytes in use on the card, by all processes."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


# ------------------------------------------------------------------------------------- report


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | step | ratio | s/step [p20, p80] | tokens | reused | " + " | ".join(PARTS) + " |",
        "|---" * (6 + len(PARTS)) + "|",
    ]
    for row in rows:
        whole = sum(row["parts"].values())
        shares = [
            f"{100 * row['parts'].get(part, 0.0) / whole:.0f} %" if whole else "" for part in PARTS
        ]
        low, high = row["seconds_p20_p80"]
        lines.append(
            f"| {row['case']} | {row['name']} | {row['ratio']:.2f} | {row['seconds_p50']:.4f} "
            f"[{low:.4f}, {high:.4f}] | {row['tokens'] or ''} | {row['reused_tokens'] or ''} | "
            + " | ".join(shares)
            + " |"
        )
    return "\n".join(lines)


def report(
    checks: list[dict[str, Any]], rows: list[dict[str, Any]], left_out: list[str], where: Any
) -> str:
    lines = ["# A MeZO step end to end", "", "Agreement with float32 on the same weights:", ""]
    for check in checks:
        word = "ok" if check["ok"] else "FAIL"
        errors = [
            f"{what} error {check[what + '_error']:.2e} "
            f"(PyTorch in the same dtype {check[what + '_error_pytorch']:.2e})"
            for what in ("loss", "grad")
        ]
        lines.append(
            f"- {check['lora_backend']}: {word}; {', '.join(errors)}, "
            f"projected_grad rms {check['grad_rms']:.2e}; |L+ - L-| at eps 0 at most "
            + ", ".join(f"{floor:.1e} ({mode})" for mode, floor in check["floors"].items())
        )
    lines += [
        "",
        "Ratio: the paper's loop's time over the candidate's, median of per-round ratios, in turn",
        "in one process; random weights. Shares of parts: under a stopwatch, synchronised.",
        "",
        table(rows),
        "",
    ]
    if left_out:
        lines += [f"Left out for want of time: {', '.join(left_out)}.", ""]
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if key != "cpu_flags")
    return "\n".join([*lines, f"Measured with: {facts}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="opt-1.3b,llama-3.1-8b,opt-13b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="directory of a small real model for the agreement check")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--directions", type=int, default=20)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    wanted = cases(arguments.shapes.split(","))
    if arguments.dry_run:
        for case in wanted:
            print(f"{case.name}: {case.shape.num_parameters() / 1e9:.2f} G parameters")
        return 0
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    started = time.perf_counter()
    checks = agreement(arguments.device, arguments.model, arguments.directions)
    rows: list[dict[str, Any]] = []
    left_out, took = [], [0.0]
    if all(check["ok"] for check in checks):
        for case in wanted:
            begin = time.perf_counter()
            if begin - started + median(took) > arguments.budget:
                left_out.append(case.name)
                continue
            rows += measure(case, arguments.device, arguments.rounds)
            took.append(time.perf_counter() - begin)
    where = environment() if arguments.device == "cpu" else gpu_environment()
    text = report(checks, rows, left_out, where)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "e2e.md").write_text(text)
        results = {**where, "agreement": checks, "rows": rows, "left_out": left_out}
        (arguments.out / "e2e.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(check["ok"] for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
