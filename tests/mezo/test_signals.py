"""A first signal waits for the end of a block, a second one does not."""

from __future__ import annotations

import signal

import pytest

from mezo._signals import finishing


def test_the_first_signal_waits():
    said, done = [], []

    def block():
        with finishing(said.append):
            signal.raise_signal(signal.SIGINT)
            done.append("behind it")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["behind it"]
    assert said == ["finishing the step; a second signal stops at once"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_one_stops_at_once():
    done = []

    def block():
        with finishing(lambda sentence: None):
            signal.raise_signal(signal.SIGINT)
            done.append("behind the first")
            signal.raise_signal(signal.SIGINT)
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["behind the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_signal_changes_nothing():
    with finishing(lambda sentence: None):
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
