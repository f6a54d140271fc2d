"""Data sets as batches: what a prompt looks like, and which words stand for the labels."""

from __future__ import annotations

from mezo.tasks import rotten_tomatoes
from mezo.tasks.base import Example, Splits, Task

TASKS: dict[str, Task] = {task.name: task for task in (rotten_tomatoes.TASK,)}

__all__ = ["TASKS", "Example", "Splits", "Task", "get"]


def get(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        names = ", ".join(sorted(TASKS))
        raise ValueError(f"get: task must be one of: {names}; got {name!r}, take one of these.")
    return TASKS[name]
