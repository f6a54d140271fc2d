from __future__ import annotations

import pytest

from mezo._registry import Registry


def test_an_unknown_name_is_answered_with_the_nearest():
    colours = Registry("colour", {"red": 1, "green": 2})
    assert list(colours) == ["red", "green"]
    for name, nearest in (("gren", "green"), ("zebra", "red"), (None, "red"), (["red"], "red")):
        with pytest.raises(ValueError, match=rf"one of: red, green; .*, use '{nearest}'\.$"):
            colours[name]
    with pytest.raises(ValueError, match=r"^paint: colour must be one of"):
        colours.check("blue", "paint: ")


def test_a_thing_comes_and_goes():
    colours = Registry("colour", {"red": 1})
    colours.register("green", 2)
    assert colours["green"] == 2
    with pytest.raises(ValueError, match="'green' must be a new name"):
        colours.register("green", 3)
    colours.unregister("green")
    assert "green" not in colours
    with pytest.raises(ValueError, match="must be one of: red; got 'green'"):
        colours.unregister("green")


def test_a_row_may_say_where_the_thing_is():
    codecs = Registry("codec", {"json": "json:loads"})
    assert codecs["json"]("[1]") == [1]
    assert codecs["json"] is codecs["json"]
