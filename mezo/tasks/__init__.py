"""Data sets as batches: what a prompt looks like, and which words stand for the labels.

To add one, write its module and a row here.
"""

from __future__ import annotations

from mezo._registry import Registry
from mezo.data.example import Example
from mezo.tasks import rotten_tomatoes
from mezo.tasks.base import Splits, Task

TASKS: Registry[Task] = Registry("task", {"rotten_tomatoes": rotten_tomatoes.TASK})

__all__ = ["TASKS", "Example", "Splits", "Task", "get"]


def get(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: there is none.
    """
    return TASKS[name]
