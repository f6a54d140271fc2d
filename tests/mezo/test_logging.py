"""Users see our warnings, and what they configure goes first."""

from __future__ import annotations

import logging

import pytest

from mezo._logging import show_warnings


@pytest.fixture
def levels(monkeypatch):
    """The two loggers; their levels are as before afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("mezo")
    before = root.level, ours.level
    monkeypatch.delenv("SGLANG_LOGGING_CONFIG_PATH", raising=False)
    ours.setLevel(logging.NOTSET)
    yield root, ours
    root.setLevel(before[0])
    ours.setLevel(before[1])


@pytest.mark.parametrize("server_level", ["error", None], ids=["callers", "sglangs"])
def test_where_sglang_has_set_the_root_warnings_are_seen(levels, server_level):
    root, ours = levels
    root.setLevel(logging.ERROR)
    show_warnings(server_level)
    assert ours.level == logging.WARNING


def test_a_users_level_stays(levels, monkeypatch):
    root, ours = levels
    root.setLevel(logging.ERROR)
    ours.setLevel(logging.CRITICAL)
    show_warnings("error")
    assert ours.level == logging.CRITICAL

    ours.setLevel(logging.NOTSET)
    root.setLevel(logging.INFO)  # configured after the engine was started
    show_warnings("error")
    assert ours.level == logging.NOTSET

    root.setLevel(logging.ERROR)
    monkeypatch.setenv("SGLANG_LOGGING_CONFIG_PATH", "logging.json")
    show_warnings("error")
    assert ours.level == logging.NOTSET
