"""Every setting of a training, with its default and its range: `MeZOConfig` and `TrainConfig`.

The command line reads them here. A task's preset may put another default in the place of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mezo._config_checks import (
    INTEGERS,
    NUMBERS,
    REMEDY,
    check_train,
    invocation_of,
    module_names,
    text_remedy,
)
from mezo._inputs import checked_choice, checked_integer, checked_number, require, shown
from mezo.optim import ESTIMATORS, OPTIMIZERS
from mezo.optim.schedule import SCHEDULES

PREFIX_MODES = ("exact", "activated", "detached")
DISTRIBUTIONS = ("gaussian", "rademacher")
DEFAULT_STEPS = 1000
T = TypeVar("T")


def _option(default: T, text: str, *names: str) -> T:
    """A field that is an option too: its help, and the names it has beside the field's own.

    ``T`` is what the field holds: the class gets the default. The first name is the one that
    Hugging Face's trainers use, if they have one.
    """
    return dataclasses.field(default=default, metadata={"help": text, "names": names})


@dataclass(frozen=True)
class MeZOConfig:
    """The adapter and the estimator of one run; every value is stored as plain Python.

    Numbers may be NumPy scalars and 0-d tensors, lists may be tuples, arrays and tensors.

    Args:
        rank: LoRA rank r, the same for every module.
        alpha: LoRA alpha; the adapter's output is scaled by ``alpha / rank``.
        target_modules: module names as PEFT writes them (`q_proj` ... `down_proj`).
        lr: learning rate; the update of one direction is ``-lr * projected_grad * z``. It may be
            overridden step by step (``mezo.step(run, batch, lr=...)``).
        eps: perturbation scale, > 0.
        seed: 64-bit seed of every z and of lora_A's initial values.
        num_directions: directions per step (n of n-SPSA); each needs two adapter slots.
        distribution: "gaussian" or "rademacher".
        clip: bound on ``abs(projected_grad)``, or None.
        prefix: "exact" (ordinary LoRA), or "activated" (activated LoRA: the adapter acts from the
            invocation on, the prompt runs on the base model, and its KV is shared by both signs and
            all directions, options, steps and epochs), or "detached" (ordinary LoRA whose prompts
            run once per step under theta for both signs: an approximation that drops the prompt's
            part of the derivative; `mezo.prefix_bias` measures by how much).
        invocation: text or token ids between every prompt and its completion. Needed by
            "activated", where it begins the adapted part; elsewhere just the end of the prompt.
        name: the adapter's name in the engine; ``engine.generate(..., lora_path=name)`` serves it.
        estimator: how losses become projected gradients (see `mezo.optim`).
        optimizer: how projected gradients become an update (see `mezo.optim`).

    Raises:
        ValueError: a value is of the wrong type (numbers as text, for example) or out of range.
    """

    rank: int = _option(8, "LoRA rank.", "lora_r", "r")
    alpha: float = _option(16.0, "LoRA alpha.", "lora_alpha")
    target_modules: tuple[str, ...] = _option(
        ("q_proj", "v_proj"), "Module names, with commas; or all-linear.", "lora_target_modules"
    )
    lr: float = _option(1e-4, "Learning rate of the first step.", "learning_rate")
    eps: float = _option(1e-2, "Perturbation scale.", "zo_eps")
    seed: int = _option(0, "Seed of the directions and of the data order.")
    num_directions: int = _option(1, "Directions per step; each needs two adapter slots.")
    distribution: str = _option("gaussian", "Of the directions: gaussian or rademacher.")
    clip: float | None = _option(None, "Bound on abs(projected_grad).")
    prefix: str = _option("exact", "exact, activated or detached (approximate).")
    invocation: str | tuple[int, ...] | None = _option(
        None, "Words between every prompt and its completion; with activated the adapter begins."
    )
    name: str = _option("mezo", "The adapter's name in the engine.", "adapter_name")
    estimator: str = _option("two_sided", "How losses become projected gradients.")
    optimizer: str = _option("sgd", "How projected gradients become an update.", "optim")

    def __post_init__(self) -> None:
        self._set("target_modules", module_names(self.target_modules))
        for field, (low, high, expected) in INTEGERS.items():
            value = getattr(self, field)
            what = f"MeZOConfig: {field}"
            self._set(field, checked_integer(what, value, low, high, expected, REMEDY[field]))
        for field, expected in NUMBERS.items():
            value = getattr(self, field)
            if field == "clip" and value is None:
                continue
            may_be_0 = field == "lr"
            self._set(
                field,
                checked_number(
                    f"MeZOConfig: {field}",
                    value,
                    lambda x, may_be_0=may_be_0: x > 0 or (may_be_0 and x == 0),  # type: ignore[misc]
                    expected,
                    text_remedy(value) or REMEDY[field],
                ),
            )
        for field, choices in (("distribution", DISTRIBUTIONS), ("prefix", PREFIX_MODES)):
            what, remedy = f"MeZOConfig: {field}", f"use {choices[0]!r}"
            self._set(field, checked_choice(what, getattr(self, field), choices, remedy))
        require(
            isinstance(self.name, str) and bool(self.name) and "/" not in self.name,
            f"MeZOConfig: name must be a non-empty string without '/', got {shown(self.name)}; "
            "use 'mezo'.",
        )
        self._set("name", str(self.name))
        ESTIMATORS.check(self.estimator, "MeZOConfig: ")
        OPTIMIZERS.check(self.optimizer, "MeZOConfig: ")
        self._set(
            "invocation", invocation_of(self.invocation, is_needed=self.prefix == "activated")
        )

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, ``alpha / rank``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TrainConfig:
    """A training: its model, data, length, evaluations and output.

    Each field says at its place what it is; `mezo train --help` shows the same.

    Raises:
        ValueError: a value of the wrong type, out of range, or one that another field excludes.
    """

    output: Path = dataclasses.field(
        metadata={
            "help": "Directory for the adapter, checkpoints, summary, log and plot.",
            "names": ("output_dir",),
        }
    )
    # Model and engine.
    model: str | None = _option(
        None,
        "Directory or hub name of the model; default SmolLM2-135M-Instruct.",
        "model_name_or_path",
    )
    model_revision: str | None = _option(None, "Revision of a hub model.")
    dtype: str | None = _option(None, "The model's dtype; default float32 on CPUs, else its own.")
    trust_remote_code: bool = _option(False, "Let the model's repository run code of its own.")
    engine: str = _option("sglang", "sglang or transformers.")
    threads: int | None = _option(
        None, "CPU hosts: engine threads; default OMP_NUM_THREADS, else 1."
    )
    max_tokens_per_forward: int | None = _option(
        None, "Bound on the tokens of one forward batch; larger steps run in micro-batches."
    )
    engine_args: Mapping[str, Any] | None = _option(
        None, "The engine's own arguments, as tp_size=2,mem_fraction_static=0.8."
    )
    # Data.
    task: str | None = _option(None, "Data set with a wording of its own, as rotten_tomatoes.")
    data: str | None = _option(
        None, "File, folder or hub name of the data; with a task its file.", "dataset_name"
    )
    dataset_config: str | None = _option(None, "Configuration of a hub data set.")
    dataset_revision: str | None = _option(None, "Revision of a hub data set.")
    train_split: str = _option("train", "Split to train on.", "dataset_train_split")
    test_split: str = _option("test", "Split to evaluate on.", "dataset_test_split")
    eval_data: str | None = _option(
        None, "File or folder to evaluate on; default the test split, else rows held out."
    )
    streaming: bool = _option(False, "Read the data while training.")
    columns: Mapping[str, str] | None = _option(
        None, "Names of the columns, as prompt=question,completion=answer."
    )
    template: Mapping[str, Any] | None = _option(
        None, "In YAML: the wording of own data: prompt, invocation, options, label, completion."
    )
    on_bad_row: str = _option("stop", "stop or skip.")
    k_shot: int | None = _option(None, "Train on so many examples of each label only.")
    train_examples: int | None = _option(
        None, "Training examples; default all of them.", "max_train_samples"
    )
    max_prompt_tokens: int | None = _option(
        None, "Leave out training examples with longer prompts."
    )
    max_length: int | None = _option(
        None, "Tokens of a row; longer prompts lose their beginning. Default: none may be too long."
    )
    shuffle: bool = _option(True, "Shuffle the training examples in each epoch.", "shuffle_dataset")
    completion_only_loss: bool | None = _option(
        None, "Loss of completions only; default where there are prompts."
    )
    assistant_only_loss: bool = _option(False, "Loss of all assistant turns of a conversation.")
    chat_template_path: str | None = _option(None, "File with a chat template.")
    # The loop.
    num_steps: int | None = _option(
        None,
        f"Steps to take; default {DEFAULT_STEPS}, or as many as the epochs.",
        "max_steps",
        "steps",
    )
    num_epochs: float | None = _option(
        None, "Epochs, where no steps are given.", "num_train_epochs"
    )
    batch_size: int = _option(16, "Examples per step.", "per_device_train_batch_size")
    accumulation: int = _option(
        1, "Batches per step, for names that others use.", "gradient_accumulation_steps"
    )
    schedule: str = _option("constant", "constant, linear or cosine.", "lr_scheduler_type")
    warmup_steps: int = _option(0, "Steps in which the learning rate rises.")
    warmup_ratio: float = _option(0.0, "The same as a share of all steps.")
    # Evaluation and saving.
    metric: str | None = _option(None, "accuracy, f1, exact_match, ...; default the task's.")
    eval_examples: int = _option(200, "Held-out examples.", "max_eval_samples")
    eval_batch_size: int = _option(
        50, "Examples of an evaluation's batch.", "per_device_eval_batch_size"
    )
    eval_every: int | None = _option(
        None, "Steps between evaluations; default before and after only.", "eval_steps"
    )
    eval_strategy: str | None = _option(None, "no (before and after only), steps or epoch.")
    save_every: int | None = _option(None, "Steps between checkpoints; default none.", "save_steps")
    save_strategy: str | None = _option(None, "no, steps, epoch or best.")
    save_total_limit: int | None = _option(None, "Checkpoints to keep, the newest and the best.")
    load_best: bool = _option(
        False, "Save the adapter that was best on held-out examples.", "load_best_model_at_end"
    )
    best_metric: str | None = _option(
        None, "What is best: loss, accuracy, ...; default loss.", "metric_for_best_model"
    )
    greater_is_better: bool | None = _option(None, "Default: as the metric is.")
    patience: int | None = _option(
        None, "Stop after so many evaluations without a better one.", "early_stopping_patience"
    )
    # Going on after a stop.
    resume_from_checkpoint: str | None = _option(
        None, "auto, or a run's directory: go on behind its last step, with its settings."
    )
    at: int | None = _option(None, "Go on behind so many steps, into another output directory.")
    allow_change: bool = _option(
        False, "Go on although settings that the steps depend on have changed, as lr."
    )
    overwrite_output_dir: bool = _option(False, "Begin anew in a directory that has a training.")
    max_skipped_steps: int | None = _option(
        None, "Stop after so many steps in a row whose losses are not finite."
    )
    # Reporting.
    logging_steps: int = _option(20, "Steps between lines of progress and trackers' records.")
    report_to: tuple[str, ...] = _option(
        (), "Trackers, with commas: tensorboard, wandb, trackio; none."
    )
    run_name: str | None = _option(None, "The run's name in trackers; default the output's name.")
    push_to_hub: bool = _option(False, "Upload the adapter afterwards.")
    hub_model_id: str | None = _option(None, "Where to; default the output's name.")

    def __post_init__(self) -> None:
        for field, value in check_train(self).items():
            object.__setattr__(self, field, value)
        SCHEDULES.check(self.schedule, "train: ")

    def steps(self, num_examples: int | None = None) -> int:
        """Return the steps to take.

        Args:
            num_examples: examples to train on; None where they are streamed.

        Raises:
            ValueError: epochs of a stream, whose length nobody knows.
        """
        if self.num_steps is not None:
            return self.num_steps
        if self.num_epochs is None:
            return DEFAULT_STEPS
        require(
            num_examples is not None,
            "train: max_steps must be given where data is streamed, got num_train_epochs, and the "
            "length of a stream is unknown; give max_steps.",
        )
        assert num_examples is not None
        return max(1, int(self.num_epochs * (num_examples // self.examples_per_step)))

    @property
    def examples_per_step(self) -> int:
        """Examples of one step."""
        return self.batch_size * self.accumulation
