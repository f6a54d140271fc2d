from __future__ import annotations

import pytest

from mezo.optim.schedule import learning_rate


def test_schedules():
    assert [learning_rate(1.0, s, 4, "linear") for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(1.0, 2, 4, "cosine") == pytest.approx(0.5)
    assert learning_rate(1.0, 3, 4, "constant") == 1.0
    with pytest.raises(ValueError, match="got 'sqrt', use 'constant'"):
        learning_rate(1.0, 0, 4, "sqrt")
