"""Fixtures that choose a backend, and the code path of the cpu backend."""

from tests.support.kernel_fixtures import *  # noqa: F403
