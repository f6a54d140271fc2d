"""`Example`: one example in words, whatever file, task or template it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mezo._inputs import require
from mezo.data.batch import Batch
from mezo.data.checks import Text


@dataclass(frozen=True)
class Example:
    """A prompt with its completion, or with labelled options; each a text or token ids.

    Args:
        prompt: what stands before the run's invocation.
        completion: what is to be learnt; None where there are options.
        options: what to choose from; None where there is a completion.
        label: index of the right option; None where there is a completion.
        answers: all right answers in the data's own words, for metrics of generated text.
        names: what each option stands for in the data's own words, for metrics of them; or none.
        group: names the question that several examples belong to, for metrics that need it.
        where: the file and the row it comes from, for error sentences.
    """

    prompt: Text
    completion: Text | None = None
    options: tuple[Text, ...] | None = None
    label: int | None = None
    answers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    group: str = ""
    where: str = field(default="", compare=False)


def batch_of(examples: Sequence[Example]) -> Batch:
    """Put examples of one kind into a batch.

    Raises:
        ValueError: no example, examples of both kinds, or what `Batch` refuses.
    """
    prompts = [example.prompt for example in examples]
    kinds = {example.options is not None for example in examples}
    require(
        len(kinds) < 2,
        "batch: examples must all have options, or all completions, got both; train on one kind.",
    )
    if kinds == {True}:
        return Batch(
            prompts=prompts,
            options=[list(example.options or ()) for example in examples],
            labels=[-1 if example.label is None else example.label for example in examples],
        )
    return Batch(prompts=prompts, completions=[example.completion or "" for example in examples])
