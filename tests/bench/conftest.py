"""The fixtures of the kernels, for what is measured and tried of them."""

from tests.support.kernel_fixtures import *  # noqa: F403
