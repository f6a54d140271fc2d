"""Trainings in children that are killed at a chosen moment, gone on with, and compared."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mezo.checkpoint.trajectory import read

# Where a training is killed: before or after the n-th call of one of these.
POINTS = (
    "forward",
    "weights",
    "append",
    "half append",
    "flush",
    "snapshot",
    "renaming",
    "evaluation",
)
# Calls of the system that fail once, the disk being full or broken, at the n-th time.
FAULTS = {"write": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EIO, "rename": errno.ENOSPC}
# What ends in SGLang's processes: its scheduler, where the next step then fails.
SCHEDULER = "scheduler"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mezo.train.training", "peft", "transformers"])


def train_in_a_child(
    options: dict[str, Any], kill: tuple[str, int, bool] | None = None
) -> int | None:
    """Run `mezo.finetune` in a child; returns its exit code, -9 where it was killed.

    Args:
        options: of the training; "model" and "data" among them.
        kill: (one of `POINTS` or `SCHEDULER`, at which call of it, whether before the call), or
            None.
    """
    process = _context.Process(target=_child, args=(options, kill))
    process.start()
    process.join(600)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def _child(options: dict[str, Any], kill: tuple[str, int, bool] | None) -> None:
    os.setsid()
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
    import torch

    torch.set_num_threads(1)
    if kill is not None:
        _arm(*kill)
    import mezo

    values = dict(options)
    mezo.finetune(values.pop("model"), values.pop("data"), **values)
    os._exit(0)


def _arm(point: str, number: int, is_before: bool) -> None:
    """Let this process kill itself at the ``number``-th call of what a point stands for."""
    import mezo.checkpoint.atomic
    import mezo.checkpoint.trajectory_writer
    import mezo.core.state
    import mezo.core.step
    import mezo.train.trainer
    from mezo.run import Run

    count = 0

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count  # the call may make others
            if mine == number and is_before:
                _die()
            found = function(*args, **kwargs)
            if mine == number:
                _die()
            return found

        return call

    if point == "forward":
        from mezo.engines.transformers import TransformersSession

        TransformersSession._score = deadly(TransformersSession._score)
    elif point == "weights":
        mezo.core.state.perturb_into = deadly(mezo.core.state.perturb_into)
    elif point == "append":
        writer = mezo.checkpoint.trajectory_writer.TrajectoryWriter
        writer.append = deadly(writer.append)
    elif point == "half append":
        write = os.write

        def half(descriptor: int, data: bytes) -> int:
            nonlocal count
            count += 1
            if count == number:
                write(descriptor, data[: len(data) // 2])
                _die()
            return write(descriptor, data)

        os.write = half
    elif point == "flush":
        os.fsync = deadly(os.fsync)
    elif point == "snapshot":
        Run.save = deadly(Run.save)
    elif point == "renaming":
        os.replace = deadly(os.replace)
        os.rename = deadly(os.rename)
    elif point == "evaluation":
        mezo.train.trainer.evaluate = deadly(mezo.train.trainer.evaluate)
    elif point in FAULTS:
        _fail(point, number)
    elif point == SCHEDULER:
        Run.step = _without_scheduler(Run.step, number)
    else:
        raise AssertionError(point)


def _fail(call: str, number: int) -> None:
    """Let the ``number``-th call of a function of `os` fail, and none before or after it."""
    function, count = getattr(os, call), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(FAULTS[call], os.strerror(FAULTS[call]))
        return function(*args, **kwargs)

    setattr(os, call, failing)


def _without_scheduler(step: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Kill the engine's scheduler while a step runs in it."""
    import threading
    import time

    def call(run: Any, *args: Any, **kwargs: Any) -> Any:
        if run.steps == number:
            from mezo.core.messages import Hello

            (pid,) = run.session.call(Hello()).pids

            def kill() -> None:
                time.sleep(0.005)
                os.kill(pid, signal.SIGKILL)

            threading.Thread(target=kill, daemon=True).start()
        return step(run, *args, **kwargs)

    return call


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def left_by(output: Path) -> dict[str, Any]:
    """All that has to be equal, bit for bit, however often a training was killed."""
    trajectory = read(output / "trajectory.mezo")
    assert trajectory.cut is None
    files = [*output.glob("checkpoint-*/*"), *output.glob("adapter/*")]
    evaluations = [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (output / "evaluations.jsonl").read_text().splitlines()
    ]
    summary = json.loads((output / "summary.json").read_text())
    kept = ("steps", "completed", "best", "is_best_loaded", "held_out", "statuses")
    return {
        "records": list(trajectory.records),
        "files": {str(path.relative_to(output)): path.read_bytes() for path in files},
        "evaluations": evaluations,
        "summary": {name: summary[name] for name in kept},
        "log": [json.loads(x)["step"] for x in (output / "steps.jsonl").read_text().splitlines()],
    }
