"""`Batch`, what a step trains on, and its encoding into token rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mezo._batch import Text, is_option_list, label_of, listed, option_lists, texts
from mezo.objectives import Targets

# Names of adapter slots besides the perturbed ones.
THETA = "theta"
BASE = "base"


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

    Raises:
        ValueError: no prompt, lengths that do not match, both or neither of completions and
            options, fewer than two options, a label that names no option, an entry of the wrong
            type; the sentence names the field and the entry.

    Example:
        >>> Batch(prompts=["2 + 2 ="], completions=[" 4"])
        >>> Batch(prompts=["fine film. It was"], options=[" bad", " good"], labels=[1])
    """

    prompts: Sequence[Text]
    completions: Sequence[Text] | None = None
    options: Sequence[Text] | Sequence[Sequence[Text]] | None = None
    labels: Sequence[int] | None = None

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
class Rows:
    """Token rows as engines take them; plain data.

    Args:
        tokens: R rows of token ids: prompt, invocation, completion.
        prefix_lens: R numbers of leading tokens that run under the prefix's adapter, else 0.
        prompt_lens: R numbers of leading tokens that are not scored, >= 1 and >= prefix_lens.
        is_normalised: R flags: False where the loss compares a row only with rows of the same
            prompt and, like it, of one completion token. Their normaliser cancels, so that an
            engine may return the token's logit in place of its log-likelihood.
        prefix_adapter: what prefixes run under: `BASE` (activated) or `THETA` (detached).
    """

    tokens: Sequence[Sequence[int]]
    prefix_lens: Sequence[int]
    prompt_lens: Sequence[int]
    is_normalised: Sequence[bool]
    prefix_adapter: str = BASE

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class EncodedBatch:
    """A batch as token rows.

    Args:
        rows: the R rows.
        targets: how the rows make a loss.
    """

    rows: Rows
    targets: Targets

    def undivided(self) -> EncodedBatch:
        """The same rows without prefixes: every token runs under the row's own adapter."""
        rows = dataclasses.replace(self.rows, prefix_lens=(0,) * len(self.rows))
        return EncodedBatch(rows, self.targets)


@dataclass(frozen=True)
class Invocation:
    """The tokens between every prompt and its completion.

    Args:
        text: as text, or None when it was given as token ids.
        tokens: as token ids; may be empty.
        prefix: the run's prefix mode: "activated" and "detached" split rows before these tokens.
    """

    text: str | None = ""
    tokens: tuple[int, ...] = ()
    prefix: str = "exact"

    @property
    def prefix_adapter(self) -> str:
        """What prefixes run under."""
        return THETA if self.prefix == "detached" else BASE

    def prefix_len(self, num_prompt_tokens: int) -> int:
        """Leading tokens of a row that run under `prefix_adapter`."""
        if self.prefix == "exact":
            return 0
        # The first completion token is scored by a token that runs under the row's own adapter.
        return num_prompt_tokens if self.tokens else max(num_prompt_tokens - 1, 0)


def encode_invocation(
    invocation: str | Sequence[int] | None, tokenizer: Any, *, prefix: str = "exact"
) -> Invocation:
    """Turn `MezoConfig.invocation` into token ids, once for a run.

    Raises:
        ValueError: text without a tokenizer, or text without a token.
    """
    if invocation is None:
        return Invocation(prefix=prefix)
    if not isinstance(invocation, str):
        return Invocation(None, tuple(invocation), prefix)
    if tokenizer is None:
        raise ValueError(
            "MezoConfig: invocation must be token ids where there is no tokenizer, got text; "
            "pass token ids, or attach with tokenizer=..."
        )
    tokens = tuple(_tokens(tokenizer, invocation, special=False))
    if not tokens:
        raise ValueError(
            f"MezoConfig: invocation must have at least one token, got {invocation!r} with none; "
            "choose words that the tokenizer knows."
        )
    return Invocation(invocation, tokens, prefix)


def last_occurrence(tokens: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index at which ``pattern`` begins last in ``tokens``, or None."""
    size, wanted = len(pattern), list(pattern)
    for start in range(len(tokens) - size, -1, -1):
        if list(tokens[start : start + size]) == wanted:
            return start
    return None


def encode(
    batch: Batch,
    tokenizer: Any,
    *,
    invocation: Invocation | None = None,
    max_row_tokens: int | None = None,
    vocab_size: int | None = None,
) -> EncodedBatch:
    """Turn a batch into token rows; every split is made on token ids.

    Text is tokenised as one string, prompt + invocation + completion, and split behind the tokens
    of the parts. Where the tokeniser merges across a border, the parts are tokenised on their own.

    Args:
        batch: N prompts.
        tokenizer: a Hugging Face tokenizer; may be None when the batch holds token ids only.
        invocation: what stands between prompt and completion.
        max_row_tokens: longest row the engine takes, or None.
        vocab_size: token ids are below it, or None.

    Returns:
        The encoded batch.

    Raises:
        ValueError: an empty prompt or completion, a row that is too long, a token id outside the
            vocabulary, two options of a prompt with the same tokens, text without a tokenizer.
    """
    middle = invocation or Invocation()
    rows, prefix_lens, prompt_lens = [], [], []
    for i, (prompt, completion) in enumerate(batch.pairs()):
        prompt_ids, completion_ids = _encode_row(prompt, completion, tokenizer, middle)
        prompt_len = len(prompt_ids) + len(middle.tokens)
        row = (*prompt_ids, *middle.tokens, *completion_ids)
        _check_row(i, row, prompt_len, max_row_tokens, vocab_size)
        rows.append(row)
        prefix_lens.append(middle.prefix_len(len(prompt_ids)))
        prompt_lens.append(prompt_len)
    _check_distinct(rows, batch.num_options())
    counts = tuple(len(r) - p for r, p in zip(rows, prompt_lens, strict=True))
    labels = None if batch.labels is None else tuple(int(x) for x in batch.labels)
    targets = Targets(counts=counts, num_options=batch.num_options(), labels=labels)
    return EncodedBatch(
        Rows(
            tuple(rows),
            tuple(prefix_lens),
            tuple(prompt_lens),
            _is_normalised(targets),
            middle.prefix_adapter,
        ),
        targets,
    )


def _is_normalised(targets: Targets) -> tuple[bool, ...]:
    """Whether each row's log-likelihood has to be one, see `Rows`."""
    if targets.num_options is None:
        return (True,) * len(targets.counts)
    flags: list[bool] = []
    for size in targets.num_options:
        counts = targets.counts[len(flags) : len(flags) + size]
        flags += [max(counts) > 1] * size
    return tuple(flags)


def _check_row(
    i: int,
    row: tuple[int, ...],
    prompt_len: int,
    max_row_tokens: int | None,
    vocab_size: int | None,
) -> None:
    """Raise for a row that cannot be scored."""
    if prompt_len == 0:
        raise ValueError(
            f"Batch: row {i} must have at least one prompt token, got an empty prompt; "
            "begin it with the tokenizer's bos token."
        )
    if len(row) == prompt_len:
        raise ValueError(
            f"Batch: row {i} must have at least one completion token, got none; "
            "drop the row or give it a completion."
        )
    if max_row_tokens is not None and len(row) > max_row_tokens:
        raise ValueError(
            f"Batch: row {i} must have at most {max_row_tokens} tokens (the engine's limit), "
            f"got {len(row)}; shorten the prompt or start the engine with a larger limit."
        )
    if min(row) < 0 or (vocab_size is not None and max(row) >= vocab_size):
        raise ValueError(
            f"Batch: token ids of row {i} must lie in the model's vocabulary of {vocab_size}, "
            f"got {min(row)}..{max(row)}; encode the text with the model's own tokenizer."
        )


def _check_distinct(rows: Sequence[tuple[int, ...]], num_options: tuple[int, ...] | None) -> None:
    """Raise when two options of a prompt are one token row: they could never be told apart."""
    start = 0
    for i, size in enumerate(num_options or ()):
        if len(set(rows[start : start + size])) < size:
            raise ValueError(
                f"Batch: options of prompt {i} must have different tokens, got one twice; "
                "choose words that the tokenizer knows."
            )
        start += size


def _encode_row(
    prompt: Text, completion: Text, tokenizer: Any, invocation: Invocation
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of one row's prompt and completion."""
    if not isinstance(prompt, str) and not isinstance(completion, str):
        return tuple(prompt), tuple(completion)
    if tokenizer is None:
        raise ValueError(
            "Batch: text needs a tokenizer, got none; pass token ids, or attach with tokenizer=..."
        )
    if not isinstance(prompt, str):
        return tuple(prompt), tuple(_tokens(tokenizer, str(completion), special=False))
    prompt_ids = _tokens(tokenizer, prompt, special=True)
    if not isinstance(completion, str):
        return tuple(prompt_ids), tuple(completion)
    if invocation.text is not None:
        joint = _tokens(tokenizer, prompt + invocation.text + completion, special=True)
        before = [*prompt_ids, *invocation.tokens]
        if joint[: len(before)] == before:
            return tuple(prompt_ids), tuple(joint[len(before) :])
    return tuple(prompt_ids), tuple(_tokens(tokenizer, completion, special=False))


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of ``text``, without a trailing eos that some tokenizers add."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if special and ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids = ids[:-1]
    return ids


def _same_length(what: str, values: Sequence[object], n: int) -> None:
    """Raise unless ``values`` has one entry a prompt."""
    if len(values) != n:
        raise ValueError(
            f"Batch: {what} must have one entry for each of the {n} prompts, "
            f"got {len(values)}; make the lists equally long."
        )
