"""What the questions of whole steps share: the paper's loop, runs in turn, parts of a step."""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

import mezo
from bench.baselines import perturb
from bench.runner import Row
from bench.timing import Call, HostClock, Timing, interleave
from mezo import objectives
from mezo.core.messages import Profile
from mezo.core.rows import THETA
from mezo.engines.transformers import TransformersSession

PARTS = ("linear", "attention", "lora", "layers", "lm_head", "weights", "engine", "messages")


class PaperLoop:
    """Algorithm 1 as the paper's code runs it: perturb in place by seed; four passes of z per step.

    A subclass says what ``loss()`` is.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], config: mezo.MeZOConfig) -> None:
        self.parameters = [parameter.data for parameter in parameters]
        self.config = config
        self.seed = 0

    def loss(self) -> float:
        raise NotImplementedError

    def perturb(self, scale: float) -> None:
        perturb(self.parameters, scale, self.seed)

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


class SlotLoop(PaperLoop):
    """The paper's loop on one LoRA slot of a `transformers` run, one padded forward per sign."""

    def __init__(self, run: mezo.Run, batch: mezo.Batch) -> None:
        session = run.session
        assert isinstance(session, TransformersSession)
        layers = session._layers.values()
        super().__init__([t for layer in layers for t in layer.slots[THETA].values()], run.config)
        self.session = session
        self.encoded = run.encode(batch)

    def loss(self) -> float:
        scores = self.session._score(self.encoded.rows, [THETA])
        targets = self.encoded.targets
        return objectives.of(targets).loss(targets, scores.logprob_sums[THETA])


def take_turns(
    plain: Mapping[str, Call],
    runs: Mapping[str, mezo.Run],
    batch: mezo.Batch,
    rounds: int,
    *,
    warm_up: int,
    seconds: float = float("inf"),
) -> list[Row]:
    """Time plain loops and runs in turn; a row for each, with the parts of the sglang steps.

    No round begins after so many ``seconds``, but for the first two.
    """
    results: dict[str, list[mezo.StepResult]] = {name: [] for name in runs}

    def stepper(name: str) -> Callable[[], None]:
        return lambda: results[name].append(mezo.step(runs[name], batch))

    calls = {**plain, **{name: stepper(name) for name in runs}}
    clock = HostClock(time.perf_counter)
    timings = interleave(calls, rounds, warm_up=warm_up, stopwatch=clock, seconds=seconds)
    rows = []
    for name, timing in timings.items():
        row = row_of(timing, results.get(name, []))
        row["parts"] = parts_of(runs[name], batch, rounds) if name.startswith("sglang") else {}
        rows.append(row)
    return rows


def parts_of(run: mezo.Run, batch: mezo.Batch, rounds: int) -> dict[str, float]:
    """`profile`; nothing where the stopwatch fails, which costs no step that was timed."""
    try:
        return profile(run, batch, rounds)
    except Exception:
        traceback.print_exc()
        return {}


def row_of(timing: Timing, results: Sequence[mezo.StepResult]) -> Row:
    """Times, the tokens of the last step, and the shares of weights and forward in a step."""
    last = results[-1] if results else None
    return {
        "name": timing.name,
        "ratio": timing.ratio,
        "seconds_p50": timing.p50,
        "seconds_p20_p80": timing.p20_p80,
        "first_loss": results[0].loss if results else None,
        "tokens": last.tokens if last else None,
        "prompt_tokens": last.prompt_tokens if last else None,
        "reused_tokens": last.reused_tokens if last else None,
        "shares": {
            part: median(r.timings[part] / r.timings["total"] for r in results[1:])
            for part in ("weights", "score")
            if len(results) > 1
        },
    }


def profile(run: mezo.Run, batch: mezo.Batch, rounds: int) -> dict[str, float]:
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


def part_shares(row: Row, digits: int = 1) -> list[str]:
    """The shares of PARTS in percent, empty where there are none."""
    whole = sum(row["parts"].values())
    return [
        f"{100 * row['parts'].get(part, 0.0) / whole:.{digits}f} %" if whole else ""
        for part in PARTS
    ]
