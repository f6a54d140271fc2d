"""Train LoRA adapters with forward passes only (MeZO), inside the engine that serves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mezo._host import declare_torchvision_schemas

# Before anything below imports transformers.
declare_torchvision_schemas()

from mezo.run import Run, attach, step
from mezo.diagnostics.prefix_bias import PrefixBias, prefix_bias
from mezo.config import MeZOConfig
from mezo.data.batch import Batch
from mezo.results import (
    EvalResult,
    EvalStatus,
    NonfiniteLossError,
    StepError,
    StepResult,
    StepStatus,
)
from mezo.train.finetune import finetune
from mezo.train.saving import PartialTraining
from mezo.train.summary import TrainSummary
from mezo.train.trainer import MeZOTrainer

if TYPE_CHECKING:
    from mezo.engines.sglang.launch import launch_engine

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "EvalResult",
    "EvalStatus",
    "MeZOConfig",
    "MeZOTrainer",
    "NonfiniteLossError",
    "PartialTraining",
    "PrefixBias",
    "Run",
    "StepError",
    "StepResult",
    "StepStatus",
    "TrainSummary",
    "attach",
    "finetune",
    "launch_engine",
    "prefix_bias",
    "step",
]


def __getattr__(name: str) -> Any:
    # SGLang is imported only where it is asked for.
    if name == "launch_engine":
        from mezo.engines.sglang.launch import launch_engine

        return launch_engine
    raise AttributeError(f"module 'mezo' has no attribute {name!r}")
