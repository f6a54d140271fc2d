"""`Batch`, what a step trains on, and the token rows that `mezo.data.encode` makes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

from mezo import objectives
from mezo._inputs import require
from mezo.core.rows import Rows
from mezo.data.checks import Text, is_option_list, label_of, listed, option_lists, texts
from mezo.objectives.base import Targets

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Prompts with one completion each, or with labelled options; as text or as token ids.

    Lists may be lists, tuples, iterators, NumPy arrays, torch tensors or Series of pandas. They are
    stored as lists of plain Python values.

    Args:
        prompts: N prompts.
        completions: N completions (loss: mean negative log-likelihood of their tokens), or None.
        options: the M options shared by all prompts, or N lists of options (loss: cross-entropy
            over the options' mean token log-likelihoods), or None.
        labels: with ``options``: N indices of the right option; False is 0, True and 1.0 are 1.
        objective: name of another loss (see `mezo.objectives`), or None for the one said above.

    Raises:
        ValueError: no prompt, lengths that do not match, both or neither of completions and
            options, fewer than two options, a label that names no option, an entry of the wrong
            type, an unknown objective or one for the other kind of batch; the sentence names the
            field and the entry.

    Example:
        >>> Batch(prompts=["2 + 2 ="], completions=[" 4"])
        >>> Batch(prompts=["fine film. It was"], options=[" bad", " good"], labels=[1])
    """

    prompts: Sequence[Text]
    completions: Sequence[Text] | None = None
    options: Sequence[Text] | Sequence[Sequence[Text]] | None = None
    labels: Sequence[int] | None = None
    objective: str | None = None

    def __post_init__(self) -> None:
        self._set("prompts", texts("prompts", self.prompts))
        n = len(self.prompts)
        if n == 0:
            raise ValueError(
                "Batch: prompts must hold at least one prompt, got none; drop the batch."
            )
        if (self.completions is None) == (self.options is None):
            raise ValueError(
                "Batch: exactly one of completions and options must be given, got "
                f"{'neither' if self.completions is None else 'both'}; pass completions=[...] to "
                "train on text or options=[...] and labels=[...] to train a classifier."
            )
        has_options = self.options is not None
        objectives.name_for(self.objective, has_options=has_options)  # checked; None stays None
        if self.completions is not None:
            self._set("completions", texts("completions", self.completions))
            _same_length("completions", self.completions, n)
            if self.labels is not None:
                raise ValueError(
                    "Batch: labels must come with options, got labels and completions; "
                    "drop labels or pass options."
                )
            return
        self._set("options", option_lists(self.options))
        if self.labels is None:
            raise ValueError(
                "Batch: options must come with labels, got none; "
                "pass the index of the right option of each prompt."
            )
        labels = listed("labels", self.labels)
        _same_length("labels", labels, n)
        sizes = [len(options) for options in self._options()]
        for i, size in enumerate(sizes):
            if size < 2:
                raise ValueError(
                    f"Batch: prompt {i} must have at least 2 options, got {size}; "
                    "use completions for a single one."
                )
        pairs = zip(labels, sizes, strict=True)
        self._set("labels", [label_of(i, label, size) for i, (label, size) in enumerate(pairs)])

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.prompts)

    def _options(self) -> list[list[Text]]:
        """The options of each prompt."""
        assert self.options is not None
        options = list(self.options)
        if not any(is_option_list(option) for option in options):
            return [options for _ in self.prompts]  # type: ignore[misc]
        _same_length("options", options, len(self.prompts))
        return [list(o) for o in options]  # type: ignore[arg-type]

    def pairs(self) -> list[tuple[Text, Text]]:
        """All rows as (prompt, completion or option), options of one prompt next to each other."""
        if self.completions is not None:
            return list(zip(self.prompts, self.completions, strict=True))
        return [(p, o) for p, opts in zip(self.prompts, self._options(), strict=True) for o in opts]

    def num_options(self) -> tuple[int, ...] | None:
        """Options of each prompt, or None for completions."""
        return None if self.options is None else tuple(len(o) for o in self._options())


@dataclass(frozen=True)
class MadeFor:
    """What token rows depend on besides their texts.

    Args:
        prefix_mode: the run's prefix mode.
        invocation: its invocation's tokens.
        max_row_tokens: longest row that was allowed, or None.
        vocab_size: token ids are below it, or None.
    """

    prefix_mode: str
    invocation: tuple[int, ...]
    max_row_tokens: int | None
    vocab_size: int | None


@dataclass(frozen=True)
class EncodedBatch:
    """A batch as token rows.

    Args:
        rows: the R rows.
        targets: how the rows make a loss.
        num_apart: rows whose completion was tokenised apart from its prompt, see
            `mezo.data.encode`.
        notes: {kind: sentence}: what a run says once about its texts.
        made_for: what the rows were made for; None for rows that a caller has made.
    """

    rows: Rows
    targets: Targets
    num_apart: int = 0
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    made_for: MadeFor | None = dataclasses.field(default=None, compare=False)

    def check_made_for(self, run: MadeFor) -> None:
        """Raise ValueError for rows that another run has encoded and that do not suit this one.

        Args:
            run: what this run's own rows are made for.
        """
        made = self.made_for
        if made is None:
            return
        require(
            (made.prefix_mode, made.invocation) == (run.prefix_mode, run.invocation),
            f"run: an encoded batch must be made for prefix {run.prefix_mode!r} and invocation "
            f"tokens {run.invocation}, got one for {made.prefix_mode!r} and {made.invocation}; "
            "encode it again.",
        )
        longest = math.inf if run.max_row_tokens is None else run.max_row_tokens
        require(
            (made.max_row_tokens or math.inf) <= longest
            or max(map(len, self.rows.tokens)) <= longest,
            f"run: an encoded batch must have rows of at most {longest} tokens, got a longer one; "
            "encode it with this run.",
        )
        size = math.inf if run.vocab_size is None else run.vocab_size
        require(
            (made.vocab_size or math.inf) <= size or max(map(max, self.rows.tokens)) < size,
            f"run: an encoded batch must have token ids below {size}, got a larger one; encode it "
            "with this run.",
        )

    def select(self, examples: Iterable[int]) -> EncodedBatch:
        """Return a batch of some of the examples, in that order, without any tokenising.

        Args:
            examples: their indices.

        Raises:
            IndexError: there is no such example.
        """
        starts = self._starts
        chosen = list(examples)
        where = [row for i in chosen for row in range(starts[i], starts[i + 1])]
        rows, targets = self.rows, self.targets

        def cut(values: Sequence[T]) -> tuple[T, ...]:
            return tuple(values[i] for i in where)

        def pick(values: Sequence[int] | None) -> tuple[int, ...] | None:
            return None if values is None else tuple(values[i] for i in chosen)

        return EncodedBatch(
            dataclasses.replace(
                rows,
                tokens=cut(rows.tokens),
                prefix_lens=cut(rows.prefix_lens),
                prompt_lens=cut(rows.prompt_lens),
                is_normalised=cut(rows.is_normalised),
            ),
            dataclasses.replace(
                targets,
                counts=cut(targets.counts),
                num_options=pick(targets.num_options),
                labels=pick(targets.labels),
            ),
            made_for=self.made_for,
        )

    def prompts(self) -> set[tuple[int, ...]]:
        """The rows' prompts, each once, as far as they run before the adapter's part."""
        pairs = zip(self.rows.tokens, self.rows.prefix_lens, strict=True)
        return {tokens[:size] for tokens, size in pairs if size}

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each example, and one past the last row."""
        sizes = self.targets.num_options or (1,) * len(self.rows)
        return [0, *accumulate(sizes)]

    def undivided(self) -> EncodedBatch:
        """The same rows without prefixes: every token runs under the row's own adapter."""
        rows = dataclasses.replace(self.rows, prefix_lens=(0,) * len(self.rows))
        return dataclasses.replace(self, rows=rows)


def _same_length(what: str, values: Sequence[object], n: int) -> None:
    """Raise unless ``values`` has one entry per prompt."""
    if len(values) != n:
        raise ValueError(
            f"Batch: {what} must have one entry for each of the {n} prompts, "
            f"got {len(values)}; make the lists equally long."
        )
