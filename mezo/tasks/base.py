"""`Task`, `Splits` and `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mezo.data.batch import Batch


@dataclass(frozen=True)
class Example:
    """A text and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Splits:
    """Examples to train on, to choose settings by, and to report on; no text is in two of them."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


class Task(Protocol):
    """A data set and its wording; `mezo train` trains on one."""

    @property
    def name(self) -> str:
        """What the command line calls it; the adapter's name too."""
        ...

    @property
    def invocation(self) -> str:
        """The words behind every prompt, with their leading space."""
        ...

    @property
    def preset(self) -> Mapping[str, Any]:
        """{field of `MeZOConfig` or `TrainConfig`: its default for this task}."""
        ...

    def load(self, path: Path | None, /) -> Splits:
        """Read the data, from a file or (None) from the cache, which it fills if need be."""
        ...

    def prompt(self, text: str, /) -> str:
        """Word the text of an example as a prompt, without a trailing space."""
        ...

    def batch(self, examples: Sequence[Example], /) -> Batch:
        """Word examples as a batch, for a run whose config has the task's invocation."""
        ...


@dataclass(frozen=True)
class OptionTask:
    """A `Task` whose labels are words: a classification data set.

    Args:
        name: what the command line calls it, and the adapter's name.
        load: reads the data, from a file or (None) from the cache, which it fills if need be.
        prompt: text of an example -> prompt, without a trailing space.
        invocation: the words behind every prompt, with their leading space.
        options: the word of each label, as it continues the invocation: with its leading space.
        preset: {field of `MeZOConfig` or `TrainConfig`: its default for this task}.
    """

    name: str
    load: Callable[[Path | None], Splits]
    prompt: Callable[[str], str]
    invocation: str
    options: tuple[str, ...]
    preset: Mapping[str, Any] = field(default_factory=dict)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Word examples as a batch, for a run whose config has the task's invocation.

        Raises:
            ValueError: no example, or a label that has no option.
        """
        return Batch(
            prompts=[self.prompt(example.text) for example in examples],
            options=list(self.options),
            labels=[example.label for example in examples],
        )
