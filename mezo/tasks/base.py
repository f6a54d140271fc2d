"""`Task`, `Splits` and `Example`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Task:
    """A classification data set and its wording.

    Args:
        name: what the command line calls it.
        load: reads the data, from a file or (None) from the cache, which it fills if need be.
        prompt: text of an example -> prompt, without a trailing space.
        invocation: the words behind every prompt, with their leading space.
        options: the word of each label, as it continues the invocation: with its leading space.
    """

    name: str
    load: Callable[[Path | None], Splits]
    prompt: Callable[[str], str]
    invocation: str
    options: tuple[str, ...]

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
