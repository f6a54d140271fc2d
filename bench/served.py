"""The work that `bench.against` times, run in a process of each checkout by that checkout's code.

The other checkout may be older or newer. So this file uses only public names of `mezo` and
`mezo_kernels`, finds the one that was renamed by getattr, and gets everything else (texts, labels,
tensor names) from `bench.against`, as JSON. A line of its own is REPLY and JSON; what the engine
prints beside them is not read.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

REPLY = "bench.against: "
EPS, COEFFICIENT = 1e-3, -1e-6

# A case: seconds of one call, and what must be equal in both checkouts.
Case = Callable[[], tuple[float, object]]


def steps(job: dict[str, Any]) -> tuple[dict[str, Case], Callable[[], None]]:
    """The steps of `bench.step`: {prefix mode: case}, and how to end."""
    import mezo

    batch = mezo.Batch(**job["batch"])
    make_config = getattr(mezo, "MeZOConfig", None) or getattr(mezo, "MezoConfig")  # noqa: B009
    is_sglang = job["engine"] == "sglang"
    engine = tokenizer = None
    cases: dict[str, Case] = {}
    for mode in ("exact", "activated") if is_sglang else ("exact",):  # a plain model holds one run
        config = make_config(**job["config"], prefix=mode, name=mode)
        if engine is None:
            engine, tokenizer = start(job["model"], config, is_sglang=is_sglang)
        cases[mode] = step_case(mezo.attach(engine, config, tokenizer=tokenizer), batch)
    return cases, (lambda: engine.shutdown()) if is_sglang else (lambda: None)


def step_case(run: Any, batch: Any) -> Case:
    def call() -> tuple[float, object]:
        started = time.perf_counter()
        result = run.step(batch)
        return time.perf_counter() - started, result.losses

    return call


def start(model_dir: str, config: object, *, is_sglang: bool) -> tuple[Any, Any]:
    """The engine and, for a plain model, its tokenizer."""
    import mezo

    if is_sglang:
        return mezo.launch_engine(model_dir, config, max_loras_per_batch=7), None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(model_dir)


def directions(job: dict[str, Any]) -> tuple[dict[str, Case], Callable[[], None]]:
    """The calls of `bench.directions` on the cpu backend: {what and dtype of the slots: case}."""
    import torch

    import mezo_kernels as mk

    torch.set_num_threads(1)
    torch.manual_seed(0)
    specs = [mk.TensorSpec(name, tuple(shape)) for name, shape in job["specs"]]
    update = ([mk.Direction(0, 1)], [COEFFICIENT])
    cases: dict[str, Case] = {}
    for dtype in (torch.bfloat16, torch.float32):
        masters = [torch.randn(spec.shape) for spec in specs]
        slots = [[m.to(dtype, copy=True) for m in masters] for _ in range(2)]
        plan = mk.AdapterPlan(masters, specs, slots)
        pair = {"directions": [mk.Direction(0, 2)] * 2, "scales": [EPS, -EPS], "backend": "cpu"}
        written = [tensor for slot in slots for tensor in slot]
        width = str(dtype).removeprefix("torch.")
        cases[f"pair, {width}"] = kernel_case(
            lambda plan=plan, pair=pair: mk.perturb_into(plan, **pair), written
        )
        cases[f"step, {width}"] = kernel_case(
            lambda plan=plan, pair=pair: mk.perturb_into(plan, **pair, update=update),
            [*masters, *written],
        )
    hot = torch.zeros(256, 1024)
    hot_plan = mk.AdapterPlan([hot], [mk.TensorSpec("hot", (256, 1024))])
    many = {
        "directions": [mk.Direction(0, step) for step in range(64)],
        "coefficients": [COEFFICIENT] * 64,
        "backend": "cpu",
    }
    cases["generation"] = kernel_case(lambda: mk.add_directions_(hot_plan, **many), [hot])
    return cases, lambda: None


def kernel_case(call: Callable[[], object], written: list[Any]) -> Case:
    """CPU time of the thread, and a checksum of the bits that were written."""
    import torch

    def run() -> tuple[float, object]:
        started = time.thread_time()
        call()
        seconds = time.thread_time() - started
        checksum = 0
        for tensor in written:
            checksum = zlib.crc32(tensor.view(torch.uint8).numpy(), checksum)
        return seconds, checksum

    return run


def say(value: object) -> None:
    print(REPLY + json.dumps(value), flush=True)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    cases, end = {"step": steps, "directions": directions}[job["question"]](job)
    say(list(cases))
    for line in sys.stdin:
        seconds, result = cases[line.strip()]()
        say({"seconds": seconds, "result": result})
    end()


if __name__ == "__main__":
    main()
