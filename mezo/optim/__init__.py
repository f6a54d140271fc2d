"""The method on scalars: estimators, optimisers, schedules.

To add one, write its module and a row here; schedules have their rows in `mezo.optim.schedule`.
"""

from __future__ import annotations

from mezo._registry import Registry
from mezo.optim.base import Estimate, Optimizer
from mezo.optim.estimate import Estimator, TwoSided
from mezo.optim.sgd import Sgd

ESTIMATORS: Registry[Estimator] = Registry("estimator", {"two_sided": TwoSided()})
OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", {"sgd": Sgd()})

__all__ = ["ESTIMATORS", "OPTIMIZERS", "Estimate", "Estimator", "Optimizer"]
