"""Data sets as batches: what a prompt looks like, and which words stand for the labels.

To add one, write its module and a row here.
"""

from __future__ import annotations

from mezo._registry import Registry
from mezo.data.example import Example
from mezo.tasks.base import Splits, Task

TASKS: Registry[Task] = Registry(
    "task",
    {
        "rotten_tomatoes": "mezo.tasks.rotten_tomatoes:TASK",
        "bbc_news": "mezo.tasks.bbc_news:TASK",
        "sst2": "mezo.tasks.sst2:TASK",
        "sst5": "mezo.tasks.sst5:TASK",
        "rte": "mezo.tasks.rte:TASK",
        "cb": "mezo.tasks.cb:TASK",
        "boolq": "mezo.tasks.boolq:TASK",
        "wsc": "mezo.tasks.wsc:TASK",
        "wic": "mezo.tasks.wic:TASK",
        "multirc": "mezo.tasks.multirc:TASK",
        "copa": "mezo.tasks.copa:TASK",
        "record": "mezo.tasks.record:TASK",
        "squad": "mezo.tasks.squad:TASK",
        "drop": "mezo.tasks.drop:TASK",
        "snli": "mezo.tasks.snli:TASK",
        "mnli": "mezo.tasks.mnli:TASK",
        "trec": "mezo.tasks.trec:TASK",
    },
)

__all__ = ["TASKS", "Example", "Splits", "Task", "get"]


def get(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: there is none.
    """
    return TASKS[name]
