"""`Task` and `Splits`: a data set with its wording."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo.data.example import Example


@dataclass(frozen=True)
class Splits:
    """Examples to train on, to choose settings by, and to report on; no text is in two of them."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Task:
    """A data set and its wording; `mezo train --task NAME` trains on it.

    Args:
        name: what the command line calls it, and the adapter's name.
        load: reads and words the data, from a file or directory, or (None) from the cache, which it
            fills if need be.
        invocation: the words between every prompt and its completion or options. Where it begins
            with a blank, prompts end without one.
        metric: name of a metric to report beside accuracy, see `mezo.train.metrics`, or None.
        preset: {field of `MeZOConfig` or `TrainConfig`: its default for this task}; only what was
            measured.
    """

    name: str
    load: Callable[[Path | None], Splits]
    invocation: str
    metric: str | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
