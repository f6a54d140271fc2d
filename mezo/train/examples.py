"""The examples of a training, from a task or from the user's own data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo import tasks
from mezo._config_checks import chooses
from mezo._inputs import require
from mezo.config import MeZOConfig, TrainConfig
from mezo.data.encode import encode_invocation
from mezo.data.example import Example
from mezo.data.held_out import sampled, split_off
from mezo.data.lengths import short_enough, shortened
from mezo.data.load import load_records, splits_of
from mezo.data.own import OwnData, default_invocation, own_examples
from mezo.settings import FROM_DATA
from mezo.tasks.sampling import k_shot
from mezo.tasks.template import Template

_HELD_OUT_SHARE = 5  # a fifth of the rows at most, where there is no split to evaluate on
_DEV_SPLITS = ("validation", "dev", "valid", "val", "eval")  # what is chosen by, by usual names
_TASK_SPLITS = tuple(field.name for field in dataclasses.fields(tasks.Splits))
_CHOSEN_ON = (
    "data: what is reported on held-out examples is also what the adapter is chosen by; give the "
    "data a split validation beside test to report on others"
)


@dataclass(frozen=True)
class TrainingExamples:
    """What a training trains and reports on.

    Args:
        train: examples to train on; an iterator where they are streamed.
        held_out: examples to evaluate on while training.
        test: examples to report on; the same as ``held_out`` unless something is chosen by that.
        metric: name of the metric to report, or None.
        invocation: the run's.
        label_names: names of the options, where they have any.
        asks: how a text is put to what was trained, see `mezo.data.own.OwnData`.
        sentences: what to say once: columns, counts, rows that were left out.
    """

    train: Sequence[Example] | Iterable[Example]
    held_out: list[Example]
    test: list[Example]
    metric: str | None
    invocation: str | tuple[int, ...] | None
    label_names: tuple[str, ...] = ()
    asks: str = "text"
    sentences: list[str] = field(default_factory=list)

    def options(self) -> tuple[str, ...]:
        """The texts that every training example chooses from; none where they are not the same."""
        some = self.train if isinstance(self.train, Sequence) else ()
        found = {example.options or () for example in some}
        (options,) = found if len(found) == 1 else ((),)
        return tuple(o for o in options if isinstance(o, str)) if options else ()


def load_examples(
    settings: TrainConfig, config: MeZOConfig, tokenizer: Any, *, data: Any = None
) -> TrainingExamples:
    """Load and word what a training needs.

    Args:
        settings: the training.
        config: the run.
        tokenizer: the model's, for chats and for lengths.
        data: rows or a data set in memory, in place of ``settings.data``.

    Raises:
        ValueError: a bad row (unless they are skipped), unknown columns, too few examples.
        OSError, AssetError: the data cannot be read or fetched.
    """
    if settings.task is not None:
        found = _of_task(settings, config, tokenizer)
    else:
        found = _of_own_data(settings, config, tokenizer, data)
    train = found.train
    if not isinstance(train, Sequence):
        return found
    if settings.k_shot is not None:
        train = k_shot(train, settings.k_shot, seed=config.seed)
    train = short_enough(train, tokenizer, settings.max_prompt_tokens)[: settings.train_examples]
    needed = settings.examples_per_step
    require(
        len(train) >= needed,
        f"train: there must be a batch of {needed} training examples, got {len(train)}; lower "
        "batch_size, or raise train_examples or max_prompt_tokens.",
    )
    return dataclasses.replace(found, train=train)


def _of_task(settings: TrainConfig, config: MeZOConfig, tokenizer: Any) -> TrainingExamples:
    """A task's examples; what chooses by evaluations gets the dev split for them."""
    assert settings.task is not None
    task = tasks.get(settings.task)
    splits = task.load(None if settings.data is None else Path(settings.data))
    invocation = config.invocation or task.invocation
    inserted = encode_invocation(invocation, tokenizer)

    def cut(examples: Sequence[Example]) -> list[Example]:
        return [shortened(e, tokenizer, inserted, settings.max_length) for e in examples]

    test = cut(splits.test[: settings.eval_examples])
    has_dev = chooses(settings) and splits.dev
    held_out = cut(splits.dev[: settings.eval_examples]) if has_dev else test
    sentences = [_CHOSEN_ON] if chooses(settings) and not has_dev else []
    return TrainingExamples(
        *(cut(splits.train), held_out, test, settings.metric or task.metric, invocation),
        sentences=sentences,
    )


def _of_own_data(
    settings: TrainConfig, config: MeZOConfig, tokenizer: Any, data: Any
) -> TrainingExamples:
    """The user's own data, with rows held out where there is nothing to evaluate on."""
    source = settings.data if data is None else data
    template = None if settings.template is None else Template.of(settings.template)
    shared = _wording(settings, tokenizer, template)
    origin: dict[str, Any] = {
        "config": settings.dataset_config,
        "revision": settings.dataset_revision,
    }
    records = load_records(
        source,
        split=settings.train_split,
        streaming=settings.streaming,
        keeps_bad=settings.on_bad_row == "skip",
        **origin,
    )
    splits = splits_of(source, (settings.test_split, *_DEV_SPLITS), **origin)
    _check_splits(settings, splits)
    invocation = None if config.invocation == FROM_DATA else config.invocation
    if invocation is None and template is not None:
        invocation = template.invocation
    if invocation is None:
        more = ("columns", "chat_template_path", "assistant_only_loss", "completion_only_loss")
        invocation = default_invocation(
            records,
            tokenizer,
            split=settings.train_split,
            **{name: shared[name] for name in more},
        )
    shared["invocation"] = invocation
    train = own_examples(
        records, split=settings.train_split, streaming=settings.streaming, **shared
    )
    sentences = [train.sentence, *train.warnings, *train.bad_sentences()]
    if settings.streaming and settings.shuffle:
        sentences.append("data: rows that are streamed come in their own order, not shuffled")
    shared |= {"label_names": train.label_names, "classes": train.classes}

    def of_split(name: str) -> OwnData:
        return own_examples(source, split=name, **origin, **shared)

    rows, held_out, test = _evaluated(settings, train, splits or (), of_split, shared, sentences)
    return TrainingExamples(
        rows,
        held_out,
        test,
        settings.metric or (template.metric if template else None),
        invocation,
        train.label_names,
        train.asks,
        sentences,
    )


def _check_splits(settings: TrainConfig, splits: Sequence[str] | None) -> None:
    """Refuse names of splits that nothing has; those of the data to train on it says itself."""
    name, default = settings.train_split, TrainConfig.train_split
    require(
        splits is not None or name == default,
        f"data: dataset_train_split must name a split, got {name!r} for data that is one split; "
        "leave it out.",
    )
    name, default = settings.test_split, TrainConfig.test_split
    require(
        name in (default, *(splits or ())) or settings.eval_data is not None,
        f"data: dataset_test_split must name a split, got {name!r}, which the data does not have; "
        "leave it out, or give eval_data.",
    )


def _evaluated(
    settings: TrainConfig,
    train: OwnData,
    splits: Sequence[str],
    of_split: Callable[[str], OwnData],
    shared: Mapping[str, Any],
    sentences: list[str],
) -> tuple[Any, list[Example], list[Example]]:
    """What is trained on, what is evaluated while training and what is reported on.

    Args:
        settings: the training.
        train: the rows of the train split.
        splits: those that the data has.
        of_split: words one of them.
        shared: how rows are worded.
        sentences: gets what is to be said.
    """

    def limited(found: OwnData) -> list[Example]:
        chosen, count = sampled(found.examples, found.keys(), settings.eval_examples)
        sentences.extend(found.bad_sentences())
        if count > settings.eval_examples:
            sentences.append(
                f"data: {settings.eval_examples} of {count} held-out rows are used, taken at "
                "random; eval_examples raises it"
            )
        return chosen

    rows: Any = train.examples
    used = (settings.train_split, settings.test_split)
    dev = next((name for name in _DEV_SPLITS if name in splits and name not in used), None)
    test: list[Example] | None = None
    if settings.eval_data is not None:
        test = limited(own_examples(settings.eval_data, split=settings.test_split, **shared))
    elif settings.test_split in splits:
        test = limited(of_split(settings.test_split))
    if dev is not None and (test is None or chooses(settings)):
        held_out = limited(of_split(dev))
        sentences.append(
            f"data: evaluated on split {dev}" + ("" if test is None else ", reported on others")
        )
    elif test is not None:
        held_out = test
    elif isinstance(rows, list):
        rows, held_out = split_off(rows, train.keys(), settings.eval_examples, _HELD_OUT_SHARE)
        sentences.append(
            f"data: {len(held_out)} of {len(rows) + len(held_out)} examples are held out to "
            "evaluate on; give eval_data for others"
        )
    else:
        held_out = []
    test = held_out if test is None else test
    if test is held_out and chooses(settings):
        sentences.append(_CHOSEN_ON)
    return rows, held_out, test


def load_test(
    settings: TrainConfig,
    config: MeZOConfig,
    tokenizer: Any,
    data: Any,
    *,
    split: str | None = None,
    label_names: tuple[str, ...] = (),
) -> list[Example]:
    """Load other examples than a training's own, worded as these.

    Args:
        settings: the training.
        config: the run, with its invocation.
        tokenizer: the model's.
        data: a file, a folder, a hub name, a data set or rows; of a task its file.
        split: of the data; None: the training's test split.
        label_names: of the training.

    Raises:
        ValueError: see `load_examples`.
    """
    if settings.task is not None:
        name = split or "test"
        require(
            name in _TASK_SPLITS,
            f"eval: split must be one of {_TASK_SPLITS} of a task, got {split!r}; name one.",
        )
        test = getattr(tasks.get(settings.task).load(Path(data)), name)
        inserted = encode_invocation(config.invocation, tokenizer)
        return [shortened(e, tokenizer, inserted, settings.max_length) for e in test]
    require(
        split is None or splits_of(data, (split,)) is not None,
        f"eval: split must come with data that has several, got {split!r} for data that is one "
        "split; leave it out.",
    )
    template = None if settings.template is None else Template.of(settings.template)
    found = own_examples(
        data,
        split=split or settings.test_split,
        invocation=config.invocation,
        label_names=label_names,
        **_wording(settings, tokenizer, template),
    )
    for sentence in found.bad_sentences():
        print(sentence)
    examples: list[Example] = found.examples
    return examples


def _wording(settings: TrainConfig, tokenizer: Any, template: Template | None) -> dict[str, Any]:
    """How rows become examples, by the settings."""
    return {
        "tokenizer": tokenizer,
        "columns": settings.columns,
        "template": template,
        "on_bad_row": settings.on_bad_row,
        "max_length": settings.max_length,
        "completion_only_loss": settings.completion_only_loss,
        "assistant_only_loss": settings.assistant_only_loss,
        "chat_template_path": settings.chat_template_path,
    }
