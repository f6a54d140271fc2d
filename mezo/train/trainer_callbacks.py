"""Hugging Face's `TrainerCallback`s and trackers, on our loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezo._inputs import one_line, require
from mezo.config import DEFAULT_STEPS, MeZOConfig, TrainConfig
from mezo.results import EvalResult
from mezo.train.best import Best
from mezo.train.callbacks import Listener, Progress
from mezo.train.logs import evaluation_record, finite_mean, step_record

_EVENTS = ("should_training_stop", "should_evaluate", "should_save")


class TrainerCallbacks(Listener):
    """Tells `transformers.TrainerCallback`s of a training, in the order in which `Trainer` does.

    Their `TrainerState` has global_step, max_steps, epoch, log_history, best_metric,
    best_global_step and best_model_checkpoint; of their `TrainerControl` stop, evaluate, log and
    save are heeded. They get no model, optimizer or dataloader: the weights are in the engine.

    Args:
        callbacks: instances, or classes that are made without arguments.
        values: fields of `TrainingArguments`, see `argument_values`.

    Raises:
        ImportError: `transformers.TrainingArguments` cannot be made (accelerate is missing).
        ValueError: an ``EarlyStoppingCallback`` without evaluations during the training.
    """

    def __init__(self, callbacks: Sequence[Any], values: Mapping[str, Any]) -> None:
        from transformers import TrainerControl, TrainerState

        self._callbacks = [kind() if isinstance(kind, type) else kind for kind in callbacks]
        self.state: Any = TrainerState()
        self.control: Any = TrainerControl()
        self._args = _arguments(values)
        require(
            self._args.eval_strategy != "no" or not any(map(stops_early, self._callbacks)),
            "train: EarlyStoppingCallback must come with evaluations during the training, got none;"
            " give eval_steps, or eval_strategy 'epoch'; early_stopping_patience does the same.",
        )
        self._losses: list[float] = []
        self._num_tokens = 0
        self._epoch, self._is_in_epoch = 0, False
        self._call("on_init_end")

    def begin(self, num_steps: int) -> None:
        """See `Listener.begin`."""
        self.state.max_steps = num_steps
        self.state.is_world_process_zero = self.state.is_local_process_zero = True
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(self.state, name, getattr(self._args, name))
        self.state.train_batch_size = self._args.per_device_train_batch_size
        self.state.num_train_epochs = math.ceil(self._args.num_train_epochs)
        self._call("on_train_begin")

    def step_begins(self, step: int, epoch: float | None) -> None:
        """See `Listener.step_begins`."""
        self.state.global_step = step
        if not self._is_in_epoch:
            self._epoch, self._is_in_epoch = int(epoch or 0), True
            self.state.epoch = epoch
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def __call__(self, progress: Progress) -> None:
        """See `Listener.__call__`."""
        self.state.global_step, self.state.epoch = progress.step, progress.epoch
        if progress.evaluation is not None:
            self._evaluated(progress.evaluation)
        if progress.result is None:
            return
        self._num_tokens += progress.result.tokens
        self.state.num_input_tokens_seen = self._num_tokens
        self._losses.append(progress.result.loss)
        self._call("on_step_end")
        is_due = progress.step % self._args.logging_steps == 0
        if is_due or progress.step == progress.num_steps or self.control.should_log:
            self.control.should_log = False
            loss, self._losses = finite_mean(self._losses), []
            self._log(step_record(progress, num_tokens=self._num_tokens, loss=loss))
        if progress.epoch is not None and int(progress.epoch) > self._epoch:
            self._end_epoch()

    def saved(self, step: int, path: Path) -> None:
        """See `Listener.saved`."""
        if step == self.state.best_global_step:
            self.state.best_model_checkpoint = str(path)
        self._call("on_save")

    def end(self) -> None:
        """See `Listener.end`."""
        self._end_epoch()
        self._call("on_train_end")

    def _end_epoch(self) -> None:
        if self._is_in_epoch:
            self._is_in_epoch = False
            self._call("on_epoch_end")

    def _evaluated(self, evaluation: EvalResult) -> None:
        record = evaluation_record(evaluation)
        self._log(record)
        self._call("on_evaluate", metrics=record)
        # Behind the call, as Trainer does: EarlyStoppingCallback compares with the best before.
        value = record.get(f"eval_{self._args.metric_for_best_model.removeprefix('eval_')}")
        if value is None or not math.isfinite(value):
            return
        best, sign = self.state.best_metric, 1.0 if self._args.greater_is_better else -1.0
        if best is None or sign * value > sign * best:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

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


def apart(callbacks: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Hugging Face's callbacks, and the others."""
    theirs = [callback for callback in callbacks if is_trainer_callback(callback)]
    return theirs, [callback for callback in callbacks if not is_trainer_callback(callback)]


def stops_early(callback: Any) -> bool:
    """Whether it is an ``EarlyStoppingCallback``, or its class."""
    if not is_trainer_callback(callback):
        return False
    from transformers import EarlyStoppingCallback

    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, EarlyStoppingCallback)


def trackers(names: Sequence[str]) -> list[Any]:
    """Return the callbacks that report a training to trackers.

    Raises:
        ImportError: one is not installed.
        ValueError: nobody is logged in to one that needs it.
    """
    if not names:
        return []
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
    return made


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


def argument_values(settings: TrainConfig, config: MeZOConfig) -> dict[str, Any]:
    """Return the settings of a training as fields of `TrainingArguments`."""
    values: dict[str, Any] = {
        "output_dir": str(settings.output),
        "run_name": settings.run_name or settings.output.name,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.eval_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "warmup_steps": settings.warmup_steps or settings.warmup_ratio,
        "max_steps": settings.num_steps or (-1 if settings.num_epochs else DEFAULT_STEPS),
        "num_train_epochs": settings.num_epochs or 1.0,
        "logging_steps": settings.logging_steps,
        "save_total_limit": settings.save_total_limit,
        "load_best_model_at_end": settings.load_best,
        "seed": config.seed % 2**32,
    }
    values["save_strategy"] = settings.save_strategy or ("steps" if settings.save_every else "no")
    if settings.save_every:
        values["save_steps"] = settings.save_every
    best = Best(settings.best_metric, greater_is_better=settings.greater_is_better)
    return values | loop_values(
        config.lr,
        settings.schedule,
        settings.eval_every,
        best,
        evaluates_by_epoch=settings.eval_strategy == "epoch",
    )


def loop_values(
    lr: float,
    schedule: str,
    eval_every: int | None,
    best: Best | None,
    *,
    evaluates_by_epoch: bool = False,
) -> dict[str, Any]:
    """Return what a loop alone knows as fields of `TrainingArguments`.

    Args:
        lr: learning rate of the first step.
        schedule: see `MeZOTrainer`.
        eval_every: steps between evaluations, or None.
        best: what is best; None: the smallest loss.
        evaluates_by_epoch: whether there is an evaluation behind each epoch.
    """
    best = best or Best()
    values: dict[str, Any] = {
        "learning_rate": lr,
        "lr_scheduler_type": _scheduler(schedule),
        "eval_strategy": "no" if eval_every is None else "steps",
        "metric_for_best_model": best.metric,
        "greater_is_better": best.greater_is_better,
    }
    if evaluates_by_epoch:
        values["eval_strategy"] = "epoch"
    if eval_every is not None:
        values["eval_steps"] = eval_every
    return values


def _arguments(values: Mapping[str, Any]) -> Any:
    """`TrainingArguments`, which callbacks read."""
    try:
        import accelerate  # noqa: F401
        from transformers import TrainingArguments
    except ImportError as error:
        raise ImportError(
            "train: Hugging Face's callbacks and trackers need accelerate, got none; run pip "
            "install 'mezo-sglang[trackers]'."
        ) from error
    values = {"output_dir": ".", "report_to": [], "use_cpu": True, **values}
    # Trainer wants checkpoints where it loads the best one from; here its weights are kept.
    loads_best = values.pop("load_best_model_at_end", False)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    require(set(values) <= known, f"train: TrainingArguments lacks {sorted(set(values) - known)}.")
    arguments = TrainingArguments(**values)
    arguments.load_best_model_at_end = loads_best
    return arguments
