"""Rotten Tomatoes: is a sentence of a film review positive or negative?"""

from __future__ import annotations

import random
from pathlib import Path

from mezo.data import formats
from mezo.data.example import Example
from mezo.data.formats import Record
from mezo.tasks import assets
from mezo.tasks.base import Splits, Task

NUM_TEST = 1000
NUM_DEV = 500
OPTIONS = (" bad", " good")
_COLUMNS = ("text", "label", "source")
_SOURCE = "rotten_tomatoes"


def load(path: Path | None = None) -> Splits:
    """Read the sentences and split them, always alike.

    Duplicate texts are dropped, the rest is shuffled with ``random.Random(0)``; the first 1,000
    are the test split, the next 500 the dev split, the other 7,030 are for training.

    Args:
        path: a file with the columns text, label (0 negative, 1 positive) and source; default
            `mezo.tasks.assets.rotten_tomatoes_csv`.

    Returns:
        The splits.

    Raises:
        ValueError: other columns, a label that is neither 0 nor 1, too few sentences.
        AssetError: the file has to be fetched and cannot be.
    """
    path = assets.rotten_tomatoes_csv() if path is None else Path(path)
    examples: dict[str, Example] = {}
    table = formats.read(path)
    if not set(_COLUMNS) <= set(table.columns):
        raise ValueError(
            f"load: {path} must have the columns {_COLUMNS}, got {table.columns}; "
            "pass the file of mezo.tasks.assets.rotten_tomatoes_csv()."
        )
    for record in table.records:
        if record.fields["source"] == _SOURCE:
            examples.setdefault(record.fields["text"], _example(record))
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


def _example(record: Record) -> Example:
    label = record.fields["label"]
    if label not in ("0", "1"):
        raise ValueError(
            f"load: label in {record.where} must be 0 or 1, got {label!r}; fix the row."
        )
    # The sentence as it is; the invocation asks for " bad" or " good" next.
    return Example(
        record.fields["text"].strip(), options=OPTIONS, label=int(label), where=record.where
    )


TASK = Task(
    name="rotten_tomatoes",
    load=load,
    invocation=" The movie was",
    # Chosen on the dev split for SmolLM2-135M-Instruct and prefix "exact".
    preset={
        "num_steps": 400,
        "lr": 3e-3,
        "schedule": "linear",
        "eps": 1e-3,
        "clip": 3.0,
        "target_modules": (
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
    },
)
