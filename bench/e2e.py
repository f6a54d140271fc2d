"""A MeZO step end to end on a GPU: the SGLang engine against plain loops, same weights' shapes.

For each shape four candidates take turns in one run: the paper's loop, the `transformers` engine,
`sglang` exact and `sglang` activated. Each case has a process of its own, so that one that ends in
an error costs no other. Last, the engine's losses and projected gradients are compared with a
float32 forward of the same small model, for both LoRA backends (`--no-agreement` leaves that out).
Cases that the time or the card's memory does not allow are named at the end. `--dry-run` prints
the cases on any host. `bench/gpu/contact.sh 3` installs SGLang on a bare box and runs this.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import mezo
from bench import runner
from bench.decoders import AGREEMENT_SHAPE, Shape, make_batch, make_config, shapes
from bench.environment import facts_line
from bench.runner import Bench, Facts, Question, Row
from bench.step_candidates import PARTS, SlotLoop, part_shares, take_turns

PROMPTS = {"sst2": (20, 40), "long": (400, 400)}  # least and most tokens of a prompt
BATCHES = (16, 64)
LORA_BACKENDS = ("csgmv", "triton")
# By name, so that SGLang 0.5.17 does not leave graphs out where it finds less than 4 GiB free.
GRAPHS = {"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "breakable"}
# Of one case: what an engine's start leaves of a minute.
ROUNDS_SECONDS = 15.0
# Activated and exact steps of 16 short prompts.
STEP_TOKENS = (96, 1152)


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    shape: Shape
    prompts: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.shape.name} b{self.batch_size} {self.prompts}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The engine against float32 on the same weights, batches and directions."""

    model_dir: str | None
    directions: int
    name: str = "agreement"


def cases(options: argparse.Namespace) -> list[Agreement | Case]:
    """16 short prompts of each shape, the other cases if asked for, then the agreement."""
    known = shapes()
    speed = [
        Case(known[name], prompts, size)
        for size in (BATCHES if options.all else BATCHES[:1])
        for prompts in (PROMPTS if options.all else list(PROMPTS)[:1])
        for name in options.shapes.split(",")
    ]
    last = [] if options.no_agreement else [Agreement(options.model, options.directions)]
    return [*speed, *last]


def measure(case: Agreement | Case, bench: Bench) -> None:
    if isinstance(case, Agreement):
        checks = agreement(bench.device, case.model_dir, case.directions)
        bench.facts["agreement"] = checks
        bench.notes += [
            f"FAIL agreement: {check['lora_backend']}: errors are above the gate"
            for check in checks
            if not check["ok"]
        ]
        return
    reason = why_too_large(case, bench.device)
    if reason is not None:
        bench.notes.append(f"{case.name}: left out. {reason}")
        return
    graphs = bench.options.graphs
    bench.rows += speed_rows(case, bench.device, bench.rounds, graphs=graphs)


def kv_tokens(case: Case) -> int:
    """KV places of a step of both runs: both signs of each, with what is shared counted twice."""
    return max(16384, 4 * case.batch_size * (PROMPTS[case.prompts][1] + 8))


def needed_bytes(case: Case) -> int:
    """Bytes of the engine's weights and KV, and of the plain loop's model, in bf16."""
    shape = case.shape
    kv = 4 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * kv_tokens(case)
    return 2 * 2 * shape.num_parameters() + kv


def why_too_large(case: Case, device: str) -> str | None:
    """Why a card cannot hold a case: SGLang would clamp the KV and cut the batch without a word."""
    if device == "cpu":
        return None
    total = torch.cuda.get_device_properties(0).total_memory
    needed = needed_bytes(case)
    if needed < 0.85 * total:
        return None
    return f"It needs {needed / 1e9:.0f} GB of {total / 1e9:.0f} GB."


def server_args(device: str, lora_backend: str, *, graphs: bool) -> dict[str, Any]:
    """Arguments of the engine that the box needs (no FlashInfer, no grammar backend)."""
    if device == "cpu":
        return {}
    return {
        "dtype": "bfloat16",
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "lora_backend": lora_backend,
        "disable_overlap_schedule": True,
        "skip_server_warmup": True,
        "mem_fraction_static": 0.5,
        **(GRAPHS if graphs else {"disable_cuda_graph": True}),
    }


def launch(
    model_dir: str,
    config: mezo.MeZOConfig,
    device: str,
    lora_backend: str,
    *,
    graphs: bool = False,
    **more: Any,
) -> Any:
    """Start the engine; ``graphs`` has SGLang's prefill CUDA graphs of such steps captured."""
    own = server_args(device, lora_backend, graphs=graphs)
    args = {"skip_tokenizer_init": True, **own, **more}
    if graphs and device != "cpu":
        args["step_tokens"] = list(STEP_TOKENS)
    return mezo.launch_engine(model_dir, config, max_loras_per_batch=7, **args)


def load_hf(model_dir: str, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device).eval()


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
        reference = pairs(load_hf(model_dir, "cpu", torch.float32), config, batches)
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
            found.append(verdict(lora_backend, ours, plain, reference, dtype) | {"floors": floors})
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
    name: str, ours: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Errors of losses and projected gradients, and whether they are within the gate."""

    def rms(values: torch.Tensor) -> float:
        return math.sqrt(values.square().mean().item())

    rounding = torch.finfo(dtype).eps / 2 * reference[:, :2].abs().max().item()
    loss, plain_loss = rms((ours - reference)[:, :2]), rms((plain - reference)[:, :2])
    grad, plain_grad = rms((ours - reference)[:, 2]), rms((plain - reference)[:, 2])
    # A loss error enters the projected gradient twice, divided by 2 eps = 0.02.
    grad_rounding = rounding * math.sqrt(2) / 0.02
    return {
        "lora_backend": name,
        "loss_error": loss,
        "loss_error_pytorch": plain_loss,
        "grad_error": grad,
        "grad_error_pytorch": plain_grad,
        "grad_rms": rms(reference[:, 2]),
        "ok": loss <= 2 * plain_loss + rounding and grad <= 2 * plain_grad + grad_rounding,
    }


def speed_rows(case: Case, device: str, rounds: int, *, graphs: bool) -> list[Row]:
    """Rows of one case: four candidates in turn."""
    rng = random.Random(case.name)
    batch = make_batch(rng, case.batch_size, PROMPTS[case.prompts], case.shape.vocab_used)
    exact = make_config(lr=1e-6, eps=1e-3, target_modules=case.shape.targets)
    activated = dataclasses.replace(exact, prefix="activated", name="activated")
    directory = tempfile.mkdtemp()
    try:
        case.shape.write(directory, with_weights=False)
        before = used_memory(device)
        engine = launch(
            directory,
            exact,
            device,
            LORA_BACKENDS[0],
            graphs=graphs,
            load_format="dummy",
            max_total_tokens=kv_tokens(case),
            max_prefill_tokens=kv_tokens(case),
        )
        try:
            engine_bytes = used_memory(device) - before
            rows = rows_on_engine(case, engine, batch, (exact, activated), device, rounds)
        finally:
            engine.shutdown()
    finally:
        shutil.rmtree(directory)
    for row in rows:
        # Asked for: SGLang may still run a batch eagerly, and says so in its log only.
        row["graphs_asked"] = graphs and str(row["name"]).startswith("sglang")
        row["engine_bytes"] = engine_bytes if str(row["name"]).startswith("sglang") else None
    return rows


def rows_on_engine(
    case: Case,
    engine: Any,
    batch: mezo.Batch,
    configs: tuple[mezo.MeZOConfig, mezo.MeZOConfig],
    device: str,
    rounds: int,
) -> list[Row]:
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
    plain = {"plain loop": SlotLoop(runs["transformers, exact"], batch).step}
    rows = take_turns(plain, runs, batch, rounds, warm_up=2, seconds=ROUNDS_SECONDS)
    peak = None if device == "cpu" else torch.cuda.max_memory_allocated()
    for run in runs.values():
        run.close()
    return [{"case": case.name, **row, "torch_peak_bytes": peak} for row in rows]


def used_memory(device: str) -> int:
    """Bytes in use on the card, by all processes."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


COLUMNS: dict[str, Callable[[Row], object]] = {
    "case": lambda r: r["case"],
    "step": lambda r: r["name"],
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "s/step [p20, p80]": lambda r: (
        f"{r['seconds_p50']:.4f} [{r['seconds_p20_p80'][0]:.4f}, {r['seconds_p20_p80'][1]:.4f}]"
    ),
    "tokens": lambda r: r["tokens"] or "",
    "reused": lambda r: r["reused_tokens"] or "",
    **{part: lambda r, i=i: part_shares(r, 0)[i] for i, part in enumerate(PARTS)},
}


def check_line(check: Facts) -> str:
    """What the agreement of one LoRA backend was."""
    errors = [
        f"{what} error {check[what + '_error']:.2e} "
        f"(PyTorch in the same dtype {check[what + '_error_pytorch']:.2e})"
        for what in ("loss", "grad")
    ]
    floors = ", ".join(f"{floor:.1e} ({mode})" for mode, floor in check["floors"].items())
    return (
        f"- {check['lora_backend']}: {'ok' if check['ok'] else 'FAIL'}; {', '.join(errors)}, "
        f"projected_grad rms {check['grad_rms']:.2e}; |L+ - L-| at eps 0 at most {floors}"
    )


def report(facts: Facts) -> str:
    checks = "\n".join(map(check_line, facts.get("agreement", ())))
    return (
        "# A MeZO step end to end\n\nAgreement with float32 on the same weights:\n\n"
        f"{checks or '- not measured'}\n\n"
        "Ratio: the paper's loop's time over the candidate's, median of per-round ratios, in turn\n"
        "in one process; random weights. Shares of parts: under a stopwatch, synchronised.\n\n"
        f"{runner.table(facts['rows'], COLUMNS)}\n\n"
        f"{runner.notes_list(facts['notes'])}{facts_line(facts)}\n"
    )


def plan(found: list[Agreement | Case]) -> str:
    return "\n".join(
        f"{case.name}: {case.shape.num_parameters() / 1e9:.2f} G parameters"
        for case in found
        if isinstance(case, Case)
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="opt-1.3b,llama-3.1-8b,opt-13b")
    parser.add_argument("--model", help="directory of a small real model for the agreement check")
    parser.add_argument("--directions", type=int, default=20)
    parser.add_argument("--all", action="store_true", help="long prompts and batches of 64, too")
    parser.add_argument("--graphs", action="store_true", help="SGLang's prefill CUDA graphs")
    parser.add_argument("--no-agreement", action="store_true", help="times only")


QUESTION = Question(
    name="e2e",
    description=__doc__,
    cases=cases,
    measure=measure,
    report=report,
    plan=plan,
    add_options=add_options,
    rounds=8,
    budget_s=540.0,
    needs_all_cases=False,
    isolate="case",
    case_limit_s=180.0,
)

if __name__ == "__main__":
    sys.exit(runner.main(QUESTION))
