"""What the tensor-parallel ranks of one message exchange: values, and whether they succeeded."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mezo.core.wire import Failure


class RankError(RuntimeError):
    """An operation failed in some rank.

    Attributes:
        failure: of the first rank that failed.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)  # its one argument, so that it can be pickled
        self.failure = failure

    def __str__(self) -> str:
        return self.failure.sentence


def gathered(value: Any, group: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    everyone = [value] * dist.get_world_size(group)
    if len(everyone) > 1:  # a single rank would pickle its value for itself
        dist.all_gather_object(everyone, value, group=group)
    return everyone


class Agreement:
    """Makes the ranks of one message agree: all succeed, or all raise; rank 0's value counts."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.is_done = False

    def __call__(self, value: Any = None, failure: Failure | None = None) -> Any:
        """Exchange values and failures once.

        Returns:
            Rank 0's value.

        Raises:
            RankError: some rank has failed.
        """
        self.is_done = True
        everyone = gathered((value, failure), self._group)
        failures = [f for _, f in everyone if f is not None]
        if failures:
            raise RankError(failures[0])
        return everyone[0][0]
