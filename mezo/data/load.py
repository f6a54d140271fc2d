"""Finds data wherever it is: a file, a folder, the hub, a data set or rows in memory."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezo._inputs import require, shown
from mezo.data import formats
from mezo.data.formats import FORMATS, Record

if TYPE_CHECKING:
    import datasets

# What `datasets` calls the kinds of files that it can stream, and how it reads them as we do.
_STREAMED: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
_SAVED = ("dataset_dict.json", "state.json")  # of `save_to_disk`: of several splits, of one


@dataclass(frozen=True)
class Records:
    """Rows as they stand in the data.

    Args:
        columns: their names.
        rows: the rows; an iterable that can be gone through once where they are streamed.
        label_names: {column: names of its labels}, for columns that say so themselves.
    """

    columns: tuple[str, ...]
    rows: Iterable[Record]
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def load_records(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Records:
    """Load a split.

    Args:
        source: a file (see `mezo.data.formats`), which is one split; a folder that
            ``save_to_disk`` has written, or one with a file per split; a hub name; a data set of
            `datasets`, or a ``DatasetDict``; a list of dicts.
        split: name of the split, where the source has several.
        config: configuration of a hub data set.
        revision: of a hub data set.
        streaming: whether to read rows only when they are needed.

    Raises:
        ValueError: nothing there, no such split, or a file that cannot be read; the sentence names
            the line where it can.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_name(os.fspath(source), split, config, revision, streaming)
    if hasattr(source, "column_names") or (
        isinstance(source, Mapping) and all(hasattr(x, "column_names") for x in source.values())
    ):
        return _from_dataset(source, split, "data")
    if isinstance(source, Sequence) and source and all(isinstance(r, Mapping) for r in source):
        columns = dict.fromkeys(name for row in source for name in row)
        return Records(
            tuple(columns),
            [
                Record(f"row {i}", {**dict.fromkeys(columns), **row})
                for i, row in enumerate(source, 1)
            ],
        )
    raise ValueError(
        "data: the source must be a file, a folder, a hub name, a data set or a list of dicts, got "
        f"{shown(source)}; pass one of these."
    )


def has_split(
    source: Any, split: str, *, config: str | None = None, revision: str | None = None
) -> bool:
    """Return whether a source has a split of that name; a single file and a list have none."""
    if isinstance(source, Mapping):
        return split in source
    if not isinstance(source, (str, os.PathLike)):
        return False
    path = Path(source)
    if path.is_file():
        return False
    if (path / _SAVED[0]).is_file():
        return (path / split).is_dir()
    if path.is_dir():
        return _file_of(path, split) is not None
    import datasets

    def names() -> list[str]:
        return list(datasets.get_dataset_split_names(str(source), config, revision=revision))

    return split in _from_hub(names, str(source))


def _from_name(
    name: str, split: str, config: str | None, revision: str | None, streaming: bool
) -> Records:
    """A file, a folder or a hub name."""
    import datasets

    path: Path | None = Path(name).expanduser()
    assert path is not None
    if path.is_dir():
        if any((path / saved).is_file() for saved in _SAVED):
            return _from_dataset(datasets.load_from_disk(str(path)), split, name)
        found = _file_of(path, split)
        require(
            found is not None,
            f"data: {name} must have a file for split {split!r}, got "
            f"{sorted(p.name for p in path.iterdir())[:8]}; name a file {split}.jsonl, or pass "
            "dataset_train_split.",
        )
        path = found
        assert path is not None
    if path.is_file():
        if streaming:
            return _streamed(path)
        try:
            table = formats.read(path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data: {path} must be text in UTF-8, got {error}; save it as UTF-8."
            ) from error
        return Records(table.columns, table.records, table.label_names)
    is_hub_name = name.count("/") <= 1 and not path.suffix and not name.startswith((".", "/", "~"))
    require(
        is_hub_name,
        f"data: {name} must be a file, a folder or a hub name, got nothing there; check the path.",
    )

    def load() -> Any:
        return datasets.load_dataset(
            name, config, split=split, revision=revision, streaming=streaming
        )

    return _from_dataset(_from_hub(load, name), split, name)


def _from_hub(call: Callable[[], Any], name: str) -> Any:
    """What the hub gives, or one sentence on why it does not."""
    try:
        return call()
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data: {name!r} must be a file or folder here, or a data set on the hub, got "
            f"{type(error).__name__}: {words}; check the name, the split and the network."
        ) from error


def _from_dataset(source: Any, split: str, name: str) -> Records:
    """A data set of `datasets`; of several splits the one that is asked for."""
    import datasets

    if isinstance(source, Mapping):
        require(
            split in source,
            f"data: split must be one of {sorted(source)} of {name}, got {split!r}; pass "
            "dataset_train_split or dataset_test_split.",
        )
        source = source[split]
    features = source.features or {}
    label_names = {
        column: tuple(feature.names)
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    columns = source.column_names
    if columns is None:  # a stream that does not know them before its first row
        columns = list(next(iter(source), {}))
    if isinstance(source, datasets.IterableDataset):
        return Records(tuple(columns), _Stream(source, name), label_names)
    rows = [Record(f"{name}, row {i}", row) for i, row in enumerate(source, 1)]
    return Records(tuple(columns), rows, label_names)


@dataclass(frozen=True)
class _Stream:
    """Rows of a stream; each iteration begins it anew."""

    source: datasets.IterableDataset
    name: str

    def __iter__(self) -> Iterator[Record]:
        for i, row in enumerate(self.source, 1):
            yield Record(f"{self.name}, row {i}", row)


def _streamed(path: Path) -> Records:
    """A file as a stream."""
    import datasets

    suffix = path.suffix.lower()
    require(
        suffix in _STREAMED,
        f"data: a file to be streamed must be one of {sorted(_STREAMED)}, got {path.name}; leave "
        "streaming out.",
    )
    builder, options = _STREAMED[suffix]
    if builder == "csv":  # all columns are texts
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=options.get("sep", ",")), [])
        texts = {name: datasets.Value("string") for name in names}
        options = {**options, "features": datasets.Features(texts)}
    source = datasets.load_dataset(
        builder, data_files=str(path), split="train", streaming=True, **options
    )
    return _from_dataset(source, "train", str(path))


def _file_of(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder: train.jsonl, train-00000.parquet; the first of several."""
    suffixes = {s for name in FORMATS for s in FORMATS[name].suffixes}
    for path in sorted(folder.iterdir()):
        is_named = path.name.startswith((f"{split}.", f"{split}-"))
        if is_named and path.suffix.lower() in suffixes:
            return path
    return None
