"""What is derived from a plan, made once."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

Plan = TypeVar("Plan")
Made = TypeVar("Made")
P = ParamSpec("P")


def per_plan(
    make: Callable[Concatenate[Plan, P], Made],
) -> Callable[Concatenate[Plan, P], Made]:
    """Call a function once per plan and further arguments; results live as long as the plan.

    Args:
        make: what derives something from a plan. Its further arguments must be hashable, and its
            result must not refer to the plan.
    """
    kept: WeakKeyDictionary[Plan, dict[object, Made]] = WeakKeyDictionary()

    @functools.wraps(make)
    def derived(plan: Plan, /, *args: P.args, **named: P.kwargs) -> Made:
        of_plan = kept.setdefault(plan, {})
        key = (args, *named.items())
        if key not in of_plan:
            of_plan[key] = make(plan, *args, **named)
        return of_plan[key]

    return derived
