"""SGLang's first breath on a GPU: twins at eps 0, exact and activated steps, where their time goes.

    python -m bench.gpu.smoke OUT.jsonl [--shape NAME] [--lora-backend NAME] [--graphs]

A line of JSON is appended for each thing that was reached, so that a failure names the last one.
Without --shape the model is tiny and has weights; a shape of `bench.decoders` has dummy weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

STARTED = time.monotonic()
STEPS, WARM_UP = 20, 5


class Log:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, what: str, **values: Any) -> None:
        at = round(time.monotonic() - STARTED, 1)
        line = json.dumps({"part": "smoke", "at": at, "what": what, **values})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def main(options: argparse.Namespace, say: Log) -> None:
    import torch

    import mezo
    from bench import decoders, e2e

    is_tiny = options.shape == "tiny"
    shape = decoders.AGREEMENT_SHAPE if is_tiny else decoders.shapes()[options.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {key: getattr(options, key) for key in ("shape", "lora_backend", "graphs")}
    say("imported", **facts, device=device, torch=torch.__version__)
    batch = decoders.make_batch(random.Random(1), 16, e2e.PROMPTS["sst2"], shape.vocab_used)
    config = decoders.make_config(lr=1e-3, eps=1e-2, target_modules=shape.targets)
    more = {} if is_tiny else {"load_format": "dummy"}
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        shape.write(directory, with_weights=is_tiny)
        engine = e2e.launch(
            directory,
            config,
            device,
            options.lora_backend,
            graphs=options.graphs,
            max_total_tokens=16384,
            **more,
        )
        say("engine", **facts)
        try:
            for mode in ("exact", "activated"):
                own = dataclasses.replace(config, prefix=mode, name=mode)
                with mezo.attach(engine, own) as run:
                    try_steps(run, batch, facts | {"mode": mode}, say)
        finally:
            engine.shutdown()


def try_steps(run: Any, batch: Any, facts: dict[str, Any], say: Log) -> None:
    """Twins at eps 0, steps, and the parts of a step under a stopwatch."""
    import mezo
    from bench.step_candidates import profile

    run.apply_update([0.3])  # away from B = 0
    twins = run.pair_losses(batch, eps=0.0)
    difference = abs(twins.loss_plus - twins.loss_minus)
    say("twins", **facts, difference=difference, loss=twins.loss_plus)
    seconds, results = [], []
    for _ in range(STEPS):
        begun = time.perf_counter()
        results.append(mezo.step(run, batch))
        seconds.append(time.perf_counter() - begun)
    last = results[-1]
    parts = {
        f"{part}_ms": round(1e3 * median(r.timings[part] for r in results[WARM_UP:]), 2)
        for part in ("weights", "score")
    }
    say(
        "steps",
        **facts,
        step_ms=round(1e3 * median(seconds[WARM_UP:]), 2),
        first_ms=round(1e3 * seconds[0]),
        **parts,
        tokens=last.tokens,
        reused=last.reused_tokens,
        grad=last.projected_grads[0],
        status=last.status.name,
    )
    found = {k: round(1e3 * v, 2) for k, v in profile(run, batch, rounds=5).items()}
    say("parts under a stopwatch, ms", **facts, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--lora-backend", default="csgmv")
    parser.add_argument("--graphs", action="store_true", help="SGLang's prefill CUDA graphs")
    given = parser.parse_args()
    log = Log(given.out)
    try:
        main(given, log)
        log("done", shape=given.shape)
    except BaseException as error:
        log(f"FAIL {type(error).__name__}: {str(error)[:500]}", shape=given.shape)
        traceback.print_exc()
        os._exit(1)  # threads of SGLang's may wait for ever
    os._exit(0)
