"""What `mezo doctor --model M` does: start an engine, check it, report one line per check."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch

import mezo_kernels
from mezo.config import MeZOConfig, TrainConfig
from mezo.core.messages import Check
from mezo.diagnostics.comparison import compare
from mezo.engines import ENGINES, available
from mezo.engines.linears import ModelLinears, leaf, linears_of
from mezo.engines.selftest import quick
from mezo.run import attach

# Layers that both engines adapt, where the checkpoint has them in every decoder layer.
_USUAL = (
    *("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    *("gate_up_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
)


def inventory() -> list[str]:
    """Return lines that say what is installed, and what is usable here or why not."""
    from mezo import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"mezo-sglang {__version__}, Python {platform.python_version()}",
        f"torch {torch.__version__}, GPU {gpu}",
    ]
    for title, table in (("engine", available()), ("backend", mezo_kernels.backends())):
        for name, reason in table.items():
            lines.append(f"{title} {name}: {'usable' if reason is None else reason}")
    return lines


def diagnose(
    model: str,
    *,
    engine: str = TrainConfig.engine,
    target_modules: Sequence[str] | None = None,
    echo: Callable[[str], Any] = print,
) -> bool:
    """Start an engine with a model, run the self-test and the comparison, print each check.

    Args:
        model: directory or hub name of the model.
        engine: name of the engine, see `mezo.engines`.
        target_modules: layers to adapt; None: all usual ones of the model.
        echo: called with each line.

    Returns:
        Whether every check holds; one that cannot be made here counts as holding.

    Raises:
        ValueError: an unknown engine, or a model whose config cannot be read.
        ImportError: the engine is not installed.
    """
    ENGINES.check(engine, "doctor: ")
    config = MeZOConfig(target_modules=tuple(target_modules or _targets(model)), name="doctor")
    echo(f"model {model}, engine {engine}, adapter on {', '.join(config.target_modules)}")
    checks = []
    with ENGINES[engine].launch(model, config) as handle:
        try:
            run = attach(handle, config, selftest=False)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            echo(_line(Check("attach", False, str(error).removeprefix("attach: "))))
            return False
        with run:
            for check in (*quick(run), compare(run)):
                checks.append(check)
                echo(_line(check))
    return all(check.is_ok for check in checks)


def _line(check: Check) -> str:
    """One line of the report."""
    word = "skipped" if check.is_skipped else "ok" if check.is_ok else "FAILED"
    return f"{word}: {check.name}: {check.detail}"


def _targets(model: str) -> list[str]:
    """The usual linear layers that a checkpoint has once in each decoder layer."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"doctor: model must be a checkpoint that transformers knows, got {model!r} "
            f"({str(error).splitlines()[0]}); pass its directory or hub name, and with code of its "
            "own --target-modules too."
        ) from error
    linears = linears_of(config)
    default = list(MeZOConfig().target_modules)
    if not isinstance(linears, ModelLinears):
        return default
    names = [leaf(name) for name in linears.shapes]
    layers = int(config.get_text_config().num_hidden_layers)
    return [name for name in _USUAL if names.count(name) == layers] or default
