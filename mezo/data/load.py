"""Finds data wherever it is: a file, a folder, the hub, a data set or rows in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mezo._inputs import one_line, require, shown
from mezo.data import formats
from mezo.data.formats import FORMATS, Record, Restarting

_MISSING = ("NAType", "NaTType")  # pandas' own words for a missing value, beside NaN
_SAVED = ("dataset_dict.json", "state.json")  # of `save_to_disk`: of several splits, of one


@dataclass(frozen=True)
class Records:
    """Rows as they stand in the data.

    Args:
        columns: their names.
        rows: the rows; `Restarting` where they are streamed.
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
    keeps_bad: bool = False,
) -> Records:
    """Load a split.

    Args:
        source: a file (see `mezo.data.formats`), which is one split; a folder that
            ``save_to_disk`` has written, or one with a file per split; a hub name; a data set of
            `datasets`, or a ``DatasetDict``; a list of dicts; or what this has returned.
        split: name of the split, where the source has several.
        config: configuration of a hub data set.
        revision: of a hub data set.
        streaming: whether to read rows only when they are needed.
        keeps_bad: whether to return lines of files that are no rows; they have a problem.

    Raises:
        ValueError: nothing there, no such split, or a file that cannot be read; the sentence names
            the line where it can.
    """
    if isinstance(source, Records):
        return source
    found = _load(source, split, config, revision, streaming, keeps_bad)
    rows = found.rows
    if isinstance(rows, Restarting):
        return replace(found, rows=Restarting(lambda: map(_without_nan, rows)))
    return replace(found, rows=[_without_nan(record) for record in rows])


def _without_nan(record: Record) -> Record:
    """A row in which values that pandas writes for missing ones are None."""
    fields = record.fields
    if not any(isinstance(x, float) or type(x).__name__ in _MISSING for x in fields.values()):
        return record  # nearly all are
    return replace(record, fields={k: None if _is_missing(v) else v for k, v in fields.items()})


def _is_missing(value: Any) -> bool:
    if type(value).__name__ in _MISSING:
        return True
    return isinstance(value, float) and math.isnan(value)


def _load(
    source: Any,
    split: str,
    config: str | None,
    revision: str | None,
    streaming: bool,
    keeps_bad: bool,
) -> Records:
    """`load_records` with the values as they are."""
    if isinstance(source, (str, os.PathLike)):
        return _from_name(os.fspath(source), split, config, revision, streaming, keeps_bad)
    require(
        not (config or revision),
        "data: dataset_config and dataset_revision must come with a hub data set, got rows in "
        "memory; leave them out.",
    )
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


def splits_of(
    source: Any, names: Iterable[str], *, config: str | None = None, revision: str | None = None
) -> tuple[str, ...] | None:
    """Return which of ``names`` are splits of a source; None if it is one split without a name."""
    if isinstance(source, Mapping):
        return tuple(name for name in names if name in source)
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(source).expanduser()
    if path.is_file() or (path / _SAVED[1]).is_file():
        return None
    if (path / _SAVED[0]).is_file():
        return tuple(name for name in names if (path / name).is_dir())
    if path.is_dir():
        return tuple(name for name in names if _files_of(path, name))

    def there() -> list[str]:
        import datasets

        return list(datasets.get_dataset_split_names(str(source), config, revision=revision))

    found = _from_hub(there, str(source))
    return tuple(name for name in names if name in found)


def _from_name(
    name: str,
    split: str,
    config: str | None,
    revision: str | None,
    streaming: bool,
    keeps_bad: bool,
) -> Records:
    """A file, a folder or a hub name."""
    path = Path(name).expanduser()
    require(
        not (path.exists() and (config or revision)),
        f"data: dataset_config and dataset_revision must come with a hub data set, got {name}, "
        "which is here; leave them out.",
    )
    if path.is_dir():
        if any((path / saved).is_file() for saved in _SAVED):
            import datasets

            return _from_dataset(datasets.load_from_disk(str(path)), split, name)
        found = _files_of(path, split)
        require(
            bool(found),
            f"data: {name} must have a file for split {split!r}, got "
            f"{sorted(p.name for p in path.iterdir())[:8]}; name a file {split}.jsonl, or pass "
            "dataset_train_split.",
        )
        return _of_files(found, streaming=streaming, keeps_bad=keeps_bad)
    if path.is_file():
        return _of_files([path], streaming=streaming, keeps_bad=keeps_bad)
    # Hub names may have dots, but do not end as files do.
    is_file_name = path.suffix.lower() in {s for n in FORMATS for s in FORMATS[n].suffixes}
    is_hub_name = name.count("/") <= 1 and not is_file_name and not name.startswith((".", "/", "~"))
    require(
        is_hub_name,
        f"data: {name} must be a file, a folder or a hub name, got nothing there; check the path.",
    )

    def load() -> Any:
        import datasets

        return datasets.load_dataset(
            name, config, split=split, revision=revision, streaming=streaming
        )

    return _from_dataset(_from_hub(load, name), split, name)


def _from_hub(call: Callable[[], Any], name: str) -> Any:
    """What the hub gives, or one sentence on why it does not."""
    try:
        return call()
    except Exception as error:
        words = one_line(error)[:200]
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

    def rows() -> Iterator[Record]:
        for i, row in enumerate(source, 1):
            yield Record(f"{name}, row {i}", row)

    if isinstance(source, datasets.IterableDataset):
        return Records(tuple(columns), Restarting(rows), label_names)
    return Records(tuple(columns), list(rows()), label_names)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder: train.jsonl, or train-00000.parquet and those after it."""
    suffixes = {s for name in FORMATS for s in FORMATS[name].suffixes}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name.startswith((f"{split}.", f"{split}-")) and path.suffix.lower() in suffixes
    ]


def _of_files(paths: Sequence[Path], *, streaming: bool, keeps_bad: bool) -> Records:
    """The rows of files, one after the other."""
    tables = []
    for path in paths:
        with _readable(path):
            tables.append(formats.read(path, streaming=streaming, keeps_bad=keeps_bad))
    columns = dict.fromkeys(name for table in tables for name in table.columns)

    def rows() -> Iterator[Record]:
        for path, table in zip(paths, tables, strict=True):
            with _readable(path):
                yield from table.records

    return Records(
        tuple(columns), Restarting(rows) if streaming else list(rows()), tables[0].label_names
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one sentence what keeps a file from being read; of a stream that comes late."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {path} must be text in UTF-8, got {error}; save it as UTF-8."
        ) from error
    except OSError as error:
        raise ValueError(
            f"data: {path} must be a file that can be read, got {error}; look at its rights."
        ) from error
