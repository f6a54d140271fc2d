"""Rotten Tomatoes: is a sentence of a film review positive or negative?"""

from __future__ import annotations

import csv
import random
from pathlib import Path

from mezo.tasks import assets
from mezo.tasks.base import Example, Splits, Task

NUM_TEST = 1000
NUM_DEV = 500
_COLUMNS = ("text", "label", "source")
_SOURCE = "rotten_tomatoes"


def load(csv_path: Path | None = None) -> Splits:
    """Read the sentences and split them, always alike.

    Duplicate texts are dropped, the rest is shuffled with ``random.Random(0)``; the first 1,000
    are the test split, the next 500 the dev split, the other 7,030 are for training.

    Args:
        csv_path: a file with the columns text, label (0 negative, 1 positive) and source; default
            `mezo.tasks.assets.rotten_tomatoes_csv`.

    Returns:
        The splits.

    Raises:
        ValueError: other columns, a label that is neither 0 nor 1, too few sentences.
        AssetError: the file has to be fetched and cannot be.
    """
    path = assets.rotten_tomatoes_csv() if csv_path is None else Path(csv_path)
    examples: dict[str, Example] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        if not set(_COLUMNS) <= set(columns):
            raise ValueError(
                f"load: {path} must have the columns {_COLUMNS}, got {columns}; "
                "pass the file of mezo.tasks.assets.rotten_tomatoes_csv()."
            )
        for row in reader:
            if row["source"] == _SOURCE:
                examples.setdefault(row["text"], _example(row, f"{path}:{reader.line_num}"))
    shuffled = list(examples.values())
    if len(shuffled) <= NUM_TEST + NUM_DEV:
        raise ValueError(
            f"load: {path} must have more than {NUM_TEST + NUM_DEV} distinct texts with source "
            f"{_SOURCE!r}, got {len(shuffled)}; pass the whole file."
        )
    random.Random(0).shuffle(shuffled)
    return Splits(
        train=shuffled[NUM_TEST + NUM_DEV :],
        dev=shuffled[NUM_TEST : NUM_TEST + NUM_DEV],
        test=shuffled[:NUM_TEST],
    )


def prompt(text: str) -> str:
    """Word a sentence: as it is; the invocation asks for " bad" or " good" next."""
    return text.strip()


def _example(row: dict[str, str], where: str) -> Example:
    if row["label"] not in ("0", "1"):
        raise ValueError(
            f"load: label in {where} must be 0 or 1, got {row['label']!r}; mend the row."
        )
    return Example(row["text"], int(row["label"]))


TASK = Task(
    name="rotten_tomatoes",
    load=load,
    prompt=prompt,
    invocation=" The movie was",
    options=(" bad", " good"),
)
