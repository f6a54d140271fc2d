"""BBC news: which of five topics is an article about?"""

from __future__ import annotations

import random
from pathlib import Path

from mezo._inputs import require
from mezo.data import formats
from mezo.data.example import Example
from mezo.data.render import label_name
from mezo.tasks import assets
from mezo.tasks.base import Splits, Task

NUM_TEST = 500
NUM_DEV = 200
LABELS = ("business", "entertainment", "politics", "sports", "tech")
OPTIONS = (
    " business and finance",
    " film and music",
    " politics and government",
    " sports and games",
    " technology and science",
)


def load(path: Path | None = None) -> Splits:
    """Read the articles and split them, always alike.

    Duplicate texts are dropped, the rest is shuffled with ``random.Random(0)``; the first 500 are
    the test split, the next 200 the dev split, the others are for training.

    Args:
        path: a file with the columns text and label (a topic's name); default
            `mezo.tasks.assets.bbc_news_csv`.

    Raises:
        ValueError: other columns, a label that is no topic, too few articles.
        AssetError: the file has to be fetched and cannot be.
    """
    path = assets.bbc_news_csv() if path is None else Path(path)
    table = formats.read(path)
    require(
        {"text", "label"} <= set(table.columns),
        f"bbc_news: {path} must have the columns text and label, got {table.columns}; pass the "
        "file of mezo.tasks.assets.bbc_news_csv().",
    )
    examples: dict[str, Example] = {}
    for record in table.records:
        text = record.fields["text"].strip()
        try:
            label = LABELS.index(label_name(record.fields["label"], LABELS))
        except ValueError as error:
            raise ValueError(f"bbc_news: {record.where}: {error}; fix the row.") from error
        # The line break belongs to the prompt: the invocation's tokens are the same behind each.
        examples.setdefault(
            text, Example(f"{text}\n\n", options=OPTIONS, label=label, where=record.where)
        )
    shuffled = list(examples.values())
    require(
        len(shuffled) > NUM_TEST + NUM_DEV,
        f"bbc_news: {path} must have more than {NUM_TEST + NUM_DEV} distinct articles, got "
        f"{len(shuffled)}; pass the whole file.",
    )
    random.Random(0).shuffle(shuffled)
    return Splits(
        train=shuffled[NUM_TEST + NUM_DEV :],
        dev=shuffled[NUM_TEST : NUM_TEST + NUM_DEV],
        test=shuffled[:NUM_TEST],
    )


TASK = Task("bbc_news", load, invocation="Topic:")
