"""Train an adapter on a task, evaluate it, save it, plot it: what `mezo train` does."""

from __future__ import annotations

import dataclasses
import json
import platform
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mezo import assets, tasks
from mezo._inputs import require
from mezo._step import Run, attach
from mezo.config import MezoConfig
from mezo.data import Batch
from mezo.report import EvalPoint, ProgressBar, StepPoint, plot_losses, write_json
from mezo.tasks import Example, Task
from mezo.trainer import MeZOTrainer, Progress, TrainSummary

ENGINES = ("sglang", "transformers")
_EVAL_BATCH = 50


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """A training run on a task.

    Args:
        task: name of the task (see `mezo.tasks`).
        output: directory for adapter/, summary.json, steps.jsonl and loss.png.
        config: the adapter and the estimator.
        engine: "sglang" or "transformers".
        model: directory or name of the model; None takes SmolLM2-135M-Instruct from the cache.
        data: file with the task's data; None takes the cache's.
        num_steps: steps to take.
        batch_size: examples a step.
        schedule: learning rate: "constant", "linear" or "cosine".
        train_examples: examples to train on, the first of the split; None takes all. With prefix
            "activated" a set whose prompts fit into the engine's cache is computed only once.
        max_prompt_tokens: training examples with longer prompts are left out; None keeps all.
        eval_examples: held-out examples (of any length) to evaluate on.
        eval_every: steps between evaluations, or None for before and after only.
        threads: CPU hosts: threads of the engine; None: see `launch_engine`.

    Raises:
        ValueError: an unknown task or engine, or a number below 1.
    """

    task: str
    output: Path
    config: MezoConfig
    engine: str = "sglang"
    model: str | None = None
    data: Path | None = None
    num_steps: int = 400
    batch_size: int = 16
    schedule: str = "linear"
    train_examples: int | None = None
    max_prompt_tokens: int | None = None
    eval_examples: int = 200
    eval_every: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        tasks.get(self.task)
        require(
            self.engine in ENGINES,
            f"train: engine must be one of {ENGINES}, got {self.engine!r}; take 'sglang'.",
        )
        for name in ("num_steps", "batch_size", "train_examples", "eval_examples", "threads"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"train: {name} must be at least 1, got {value}; raise it.",
            )


def train_task(settings: TaskSettings) -> dict[str, Any]:
    """Train, evaluate before and after, save the adapter, the log, the plot and the summary.

    Args:
        settings: what to do.

    Returns:
        The content of summary.json.

    Raises:
        ValueError: no training example is short enough.
        AssetError: the model or the data cannot be fetched.
        ImportError: the engine is not installed.
    """
    task = tasks.get(settings.task)
    model = settings.model or str(assets.model_dir())
    splits = task.load(settings.data)
    settings.output.mkdir(parents=True, exist_ok=True)
    print(f"Starting the {settings.engine} engine with {Path(model).name} ...", flush=True)
    with (
        _engine(settings, model) as (engine, tokenizer),
        attach(engine, settings.config, tokenizer=tokenizer) as run,
    ):
        train = _short_enough(splits.train, task, run, settings.max_prompt_tokens)[
            : settings.train_examples
        ]
        require(
            len(train) >= settings.batch_size,
            f"train: there must be a batch of {settings.batch_size} training examples, got "
            f"{len(train)}; raise train_examples or max_prompt_tokens.",
        )
        held_out = splits.test[: settings.eval_examples]
        log = _Log(settings, task, model)
        trainer = MeZOTrainer(
            run,
            batches(task, train, settings.batch_size, settings.config.seed),
            num_steps=settings.num_steps,
            schedule=settings.schedule,
            held_out=[
                task.batch(held_out[i : i + _EVAL_BATCH])
                for i in range(0, len(held_out), _EVAL_BATCH)
            ],
            eval_every=settings.eval_every,
            callbacks=[log],
        )
        with log:
            summary = trainer.train()
        run.save(settings.output / "adapter")
        record = _record(settings, run, summary, num_train=len(train), model=model)
        record["evaluations"] = log.evaluations
    write_json(settings.output / "summary.json", record)
    log.plot()
    print(_closing_words(record, settings.output))
    return record


def batches(task: Task, examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end, reshuffled each epoch; the order is a function of the seed."""
    rng = random.Random(seed)
    while True:
        order = list(examples)
        rng.shuffle(order)
        for i in range(0, len(order) - batch_size + 1, batch_size):
            yield task.batch(order[i : i + batch_size])


def _short_enough(
    examples: Sequence[Example], task: Task, run: Run, limit: int | None
) -> list[Example]:
    """The examples whose prompts have at most ``limit`` tokens."""
    if limit is None:
        return list(examples)
    tokenizer = run.session.tokenizer
    lengths = [len(ids) for ids in tokenizer([task.prompt(e.text) for e in examples])["input_ids"]]
    return [e for e, n in zip(examples, lengths, strict=True) if n <= limit]


@contextmanager
def _engine(settings: TaskSettings, model: str) -> Iterator[tuple[Any, Any]]:
    """The engine and, for transformers, the tokenizer."""
    if settings.engine == "sglang":
        from mezo.sglang.launch import launch_engine

        engine = launch_engine(model, settings.config, threads=settings.threads)
        try:
            yield engine, None
        finally:
            engine.shutdown()
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hf_model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    yield hf_model.to(device), AutoTokenizer.from_pretrained(model)


class _Log:
    """Shows progress, writes steps.jsonl and keeps the points of the plot."""

    def __init__(self, settings: TaskSettings, task: Task, model: str) -> None:
        self._settings = settings
        self._bar = ProgressBar(settings.num_steps)
        self._file = (settings.output / "steps.jsonl").open("w", encoding="utf-8")
        self._steps: list[StepPoint] = []
        self.evaluations: list[EvalPoint] = []
        self._label = (
            f"{Path(model).name} on {task.name}, engine {settings.engine}, "
            f"prefix {settings.config.prefix}, seed {settings.config.seed}"
        )

    def __enter__(self) -> _Log:
        self._bar.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.__exit__(*exc)
        self._file.close()

    def __call__(self, progress: Progress) -> None:
        if progress.evaluation is not None:
            scores = progress.evaluation
            self.evaluations.append(
                EvalPoint(progress.step, progress.seconds, scores.loss, scores.accuracy)
            )
            self._bar.write(
                f"held out, after {progress.step} steps: cross-entropy {scores.loss:.4f} nats, "
                f"accuracy {scores.accuracy:.3f} ({scores.num_examples} examples)"
            )
        if progress.result is not None:
            result = progress.result
            grads = result.projected_grads or (float("nan"),)
            grad = sum(grads) / len(grads)
            self._steps.append(StepPoint(progress.step, progress.seconds, result.loss, grad))
            self._bar.update(
                step=progress.step,
                seconds=progress.seconds,
                loss=result.loss,
                projected_grad=grad,
                tokens_per_s=result.tokens / result.timings["total"],
            )
            record = {**dataclasses.asdict(result), "status": result.status.name}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def plot(self) -> None:
        """Draw loss.png."""
        plot_losses(
            self._settings.output / "loss.png",
            self._steps,
            self.evaluations,
            title=f"MeZO, {self._settings.num_steps} steps",
            label_text=self._label,
        )


def _record(
    settings: TaskSettings, run: Run, summary: TrainSummary, *, num_train: int, model: str
) -> dict[str, Any]:
    """What summary.json holds."""
    from mezo import __version__

    def scores(result: Any) -> dict[str, Any]:
        return {
            "accuracy": result.accuracy,
            "cross_entropy": result.loss,
            "num_examples": result.num_examples,
        }

    return {
        "held_out": {"before": scores(summary.before), "after": scores(summary.after)},
        "batch_size": settings.batch_size,
        "config": dataclasses.asdict(settings.config),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "engine": settings.engine,
        "host": {"machine": platform.machine(), "python": platform.python_version()},
        "max_prompt_tokens": settings.max_prompt_tokens,
        "model": Path(model).name,
        "schedule": settings.schedule,
        "seconds_per_step": summary.seconds / summary.steps,
        "seed": settings.config.seed,
        "skipped_steps": summary.skipped,
        "steps": summary.steps,
        "task": settings.task,
        "tokens_computed": summary.tokens,
        "prompt_tokens_computed": summary.prompt_tokens,
        "prompt_tokens_reused": summary.reused_tokens,
        "tokens_per_second": summary.tokens / summary.seconds,
        "train_examples": num_train,
        "versions": {"mezo-sglang": __version__, **run.session.versions},
    }


def _closing_words(record: dict[str, Any], output: Path) -> str:
    """Two lines on what was reached and where it lies."""
    scores = record["held_out"]
    before, after = scores["before"], scores["after"]
    return (
        f"Held-out cross-entropy {before['cross_entropy']:.4f} -> {after['cross_entropy']:.4f} "
        f"nats, accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} "
        f"({after['num_examples']} examples), {record['steps']} steps of "
        f"{record['seconds_per_step']:.2f} s.\n"
        f"Wrote {output}/adapter, summary.json, steps.jsonl and loss.png."
    )
