"""Hugging Face's `TrainerCallback`s and trackers, on our loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezo._inputs import one_line, require
from mezo.config import MeZOConfig, TrainConfig
from mezo.results import EvalResult
from mezo.train.callbacks import Listener, Progress
from mezo.train.logs import evaluation_record, step_record

_EVENTS = ("should_training_stop", "should_evaluate", "should_save")


class TrainerCallbacks(Listener):
    """Tells `transformers.TrainerCallback`s of a training, in the order in which `Trainer` does.

    Their `TrainerState` has global_step, max_steps, epoch, log_history, best_metric and
    best_model_checkpoint; of their `TrainerControl` stop, evaluate and save are heeded. They get
    no model, optimizer or dataloader: the weights are in the engine.

    Args:
        callbacks: instances.
        output: the training's directory.
        settings: of the training, for the trackers; None where there are none.
        config: of the run.

    Raises:
        ImportError: `transformers.TrainingArguments` cannot be made (accelerate is missing).
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        *,
        output: Path | None = None,
        settings: TrainConfig | None = None,
        config: MeZOConfig | None = None,
    ) -> None:
        from transformers import TrainerControl, TrainerState

        self._callbacks = list(callbacks)
        self.state: Any = TrainerState()
        self.control: Any = TrainerControl()
        self._args = _arguments(output, settings, config)
        self._every = settings.logging_steps if settings else 1
        self._num_tokens = 0
        self._epoch = 0

    def begin(self, num_steps: int) -> None:
        """See `Listener.begin`."""
        self.state.max_steps = num_steps
        self.state.is_world_process_zero = self.state.is_local_process_zero = True
        self._call("on_train_begin")

    def __call__(self, progress: Progress) -> None:
        """See `Listener.__call__`."""
        self.state.global_step, self.state.epoch = progress.step, progress.epoch
        if progress.evaluation is not None:
            self._evaluated(progress.evaluation)
        if progress.result is None:
            return
        self._num_tokens += progress.result.tokens
        self.state.num_input_tokens_seen = self._num_tokens
        self._call("on_step_end")
        if progress.step % self._every == 0 or progress.step == progress.num_steps:
            self._log(step_record(progress, num_tokens=self._num_tokens))
        if progress.epoch is not None and int(progress.epoch) > self._epoch:
            self._epoch = int(progress.epoch)
            self._call("on_epoch_end")

    def saved(self, step: int, path: Path) -> None:
        """See `Listener.saved`."""
        self._call("on_save")

    def end(self) -> None:
        """See `Listener.end`."""
        self._call("on_train_end")

    def _evaluated(self, evaluation: EvalResult) -> None:
        record = evaluation_record(evaluation)
        self._log(record)
        self._call("on_evaluate", metrics=record)

    def _log(self, record: dict[str, Any]) -> None:
        self.state.log_history.append({**record, "step": self.state.global_step})
        self._call("on_log", logs=record)

    def _call(self, event: str, **more: Any) -> None:
        for callback in self._callbacks:
            changed = getattr(callback, event)(self._args, self.state, self.control, **more)
            self.control = changed or self.control
        for name, ours in zip(
            _EVENTS, ("should_stop", "should_evaluate", "should_save"), strict=True
        ):
            if getattr(self.control, name):
                setattr(self, ours, True)
                if name != "should_training_stop":
                    setattr(self.control, name, False)


def trackers(
    names: Sequence[str], *, output: Path, settings: TrainConfig, config: MeZOConfig
) -> TrainerCallbacks | None:
    """Return what reports a training to trackers, or None for none of them.

    Raises:
        ImportError: one is not installed.
        ValueError: nobody is logged in to one that needs it.
    """
    if not names:
        return None
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        made = [kind() for kind in get_reporting_integration_callbacks(list(names))]
    except (RuntimeError, ImportError) as error:
        words = one_line(error)
        raise ImportError(
            f"train: report_to must name trackers that are installed, got {list(names)} ({words}); "
            f"run pip install {' '.join(names)}."
        ) from error
    if "wandb" in names:
        _log_in()
    return TrainerCallbacks(made, output=output, settings=settings, config=config)


def _log_in() -> None:
    """Log in to Weights & Biases now; its callback would do so when the model is there."""
    import wandb

    try:
        wandb.login()  # does nothing where WANDB_MODE is offline or disabled
    except Exception as error:
        raise ValueError(
            f"train: report_to wandb must have a login, got {type(error).__name__}: "
            f"{one_line(error).rstrip('.')}; run wandb login, or set WANDB_MODE=offline."
        ) from error


def is_trainer_callback(callback: Any) -> bool:
    """Whether it is one of Hugging Face's."""
    return hasattr(callback, "on_step_end") and hasattr(callback, "on_train_begin")


def _scheduler(schedule: str) -> str:
    """Hugging Face's name of a schedule; "constant" for one of the user's own."""
    from transformers import SchedulerType

    return schedule if schedule in {kind.value for kind in SchedulerType} else "constant"


def _arguments(output: Path | None, settings: TrainConfig | None, config: MeZOConfig | None) -> Any:
    """The settings as `TrainingArguments`, which callbacks read."""
    try:
        import accelerate  # noqa: F401
        from transformers import TrainingArguments
    except ImportError as error:
        raise ImportError(
            "train: Hugging Face's callbacks and trackers need accelerate, got none; run pip "
            "install 'mezo-sglang[trackers]'."
        ) from error
    values: dict[str, Any] = {"output_dir": str(output or "."), "report_to": [], "use_cpu": True}
    if settings is not None and config is not None:
        values |= {
            "run_name": settings.run_name or settings.output.name,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.eval_batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "learning_rate": config.lr,
            "lr_scheduler_type": _scheduler(settings.schedule),
            "warmup_steps": settings.warmup_steps,
            "max_steps": settings.num_steps or -1,
            "num_train_epochs": settings.num_epochs or 1.0,
            "logging_steps": settings.logging_steps,
            "seed": config.seed % 2**32,
        }
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    require(set(values) <= known, f"train: TrainingArguments lacks {sorted(set(values) - known)}.")
    return TrainingArguments(**values)
