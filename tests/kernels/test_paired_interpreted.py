"""The triton backend of attention and label losses, in Triton's interpreter."""

import pytest

pytest.importorskip("triton")

from tests.support.interpreted import run_interpreted
from tests.support.interpreted_paired import CHECKS


@pytest.fixture(scope="module")
def results():
    """What each check said, in a process whose triton interprets."""
    return run_interpreted("tests.support.interpreted_paired", "-W", "error")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] is None, results[check]
