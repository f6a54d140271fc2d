"""Writes what a training does to its trajectory, before anybody else hears of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from mezo._closing import closing
from mezo._inputs import require
from mezo.checkpoint.atomic import replace_file
from mezo.checkpoint.records import JsonLines, plain
from mezo.checkpoint.run_directory import EVALUATIONS, TRAJECTORY
from mezo.checkpoint.trajectory import Header, StepRecord, theta_0_hash
from mezo.checkpoint.trajectory_writer import TrajectoryWriter
from mezo.config import TrainConfig
from mezo.results import NonfiniteLossError, StepResult, StepStatus
from mezo.run import Run
from mezo.settings import as_yaml
from mezo.train.callbacks import Listener, Progress
from mezo.train.logged import evaluation_fields
from mezo.train.resume import Past, make_room


class Recorder(Listener):
    """Appends each step to a trajectory, and each evaluation to a log beside it.

    Args:
        run: the run; its ``steps`` are those that the trajectory has.
        writer: of the trajectory.
        directory: where evaluations.jsonl is.
        evaluations: records that were there before.
        examples_per_step: training examples of a step.
        max_skipped: skipped steps in a row after which the training stops; None: never.
    """

    def __init__(
        self,
        run: Run,
        writer: TrajectoryWriter,
        directory: Path,
        *,
        evaluations: Sequence[Mapping[str, Any]] = (),
        examples_per_step: int,
        max_skipped: int | None = None,
    ) -> None:
        self._run, self._writer, self._next = run, writer, run.steps
        self._path, self._kept = directory / EVALUATIONS, evaluations
        self._evaluations: JsonLines | None = None
        self._per_step, self._max_skipped = examples_per_step, max_skipped
        self._skipped = 0

    def begin(self, num_steps: int) -> None:
        """See `Listener.begin`."""
        self._evaluations = JsonLines(self._path, self._kept)

    def __call__(self, progress: Progress) -> None:
        """Note a step or an evaluation.

        Raises:
            OSError: the disk takes no more; the steps until then are in the trajectory.
            NonfiniteLossError: too many steps were skipped in a row.
        """
        if progress.evaluation is not None:
            assert self._evaluations is not None
            self._evaluations.write(evaluation_fields(progress))
            self.sync()
        if progress.result is not None:
            self._append(progress.result)
            self._count_skipped(progress.result)

    def sync(self) -> None:
        """Make every step so far durable: before a snapshot, which is nothing without them."""
        self._writer.sync()

    def end(self) -> None:
        """Note a step that was taken, but interrupted before anybody heard of it."""
        last = self._run.last_result
        if last is not None and last.step == self._next:
            self._append(last)
        if self._evaluations is not None:
            self._evaluations.close()
        self.sync()

    def _append(self, result: StepResult) -> None:
        self._writer.append(
            StepRecord(
                step=result.step,
                coefficients=result.coefficients,
                losses=result.losses,
                status=result.status.name,
                cursor=(result.step + 1) * self._per_step,
            )
        )
        self._next = result.step + 1

    def _count_skipped(self, result: StepResult) -> None:
        is_skipped = result.status is StepStatus.NONFINITE_LOSS
        self._skipped = self._skipped + 1 if is_skipped else 0
        if self._max_skipped is not None and self._skipped >= self._max_skipped:
            error = NonfiniteLossError(
                f"train: at most {self._max_skipped} steps in a row may be skipped "
                f"(max_skipped_steps), got step {result.step} as the last of so many whose losses "
                "were not finite; go on from an earlier step (at) with a lower lr."
            )
            error.result = result
            raise error


@contextmanager
def recording(
    run: Run,
    settings: TrainConfig,
    past: Past | None,
    *,
    model: Mapping[str, str],
    data: Mapping[str, str],
) -> Iterator[Recorder]:
    """Open the trajectory of a training, bring the run to where it goes on, and record its steps.

    Args:
        run: fresh from `mezo.attach`.
        settings: of the training.
        past: what it goes on from, or None.
        model: what identifies the model, see `mezo.checkpoint.identity`.
        data: what identifies the training examples.

    Raises:
        ValueError: the run's tensors are not those of ``past``, or somebody else is writing.
        OSError: the trajectory cannot be written.
    """
    path = settings.output / TRAJECTORY
    header = _header(run, settings, model, data, past)
    if past is not None:
        require(
            past.header.tensors == header.tensors and past.header.theta_0 == header.theta_0,
            f"train: the adapter must begin as that of {past.source}, got other tensors or other "
            "initial values; use the mezo-sglang and the model that began the training.",
        )
    is_own = past is not None and path.exists() and path.samefile(past.source / TRAJECTORY)
    if not is_own:
        make_room(settings.output)
    writer = TrajectoryWriter.append_to(path) if is_own else TrajectoryWriter.create(path, header)
    with closing(writer.close):
        if past is not None:
            if not is_own:
                for record in past.trajectory.records[: past.num_steps]:
                    writer.append(record)
                writer.sync()
            run.apply_updates(past.coefficients())
        replace_file(settings.output / "run.yaml", as_yaml(settings, run.config).encode())
        yield Recorder(
            run,
            writer,
            settings.output,
            evaluations=past.evaluation_records if past else (),
            examples_per_step=settings.examples_per_step,
            max_skipped=settings.max_skipped_steps,
        )


def _header(
    run: Run,
    settings: TrainConfig,
    model: Mapping[str, str],
    data: Mapping[str, str],
    past: Past | None,
) -> Header:
    """What a replay of the run and a later training need to know of it."""
    from mezo import __version__

    weights = run.weights()
    shapes = {name: weights[name].shape for name in sorted(weights)}
    tensors = tuple((name, (shape[0], shape[1])) for name, shape in shapes.items())
    partners = {name: list(shape) for name, shape in run.session.partners.items()}
    return Header(
        seed=run.config.seed,
        distribution=run.config.distribution,
        num_directions=run.config.num_directions,
        tensors=tensors,
        theta_0=theta_0_hash(weights),
        model=dict(model),
        data=dict(data),
        adapter={
            "base_model": run.session.model_path or None,
            "alora_invocation_tokens": list(run.invocation.activating_tokens) or None,
            "partners": partners,
        },
        config=plain(run.config),
        settings=yaml.safe_load(as_yaml(settings, run.config)),
        versions={"mezo-sglang": __version__, **run.session.versions},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        branch=None if past is None else {"of": str(past.source), "at": past.num_steps},
    )
