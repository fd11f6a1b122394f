"""What differs among settings."""

from scripts.lib.settings import differing, flat


def test_settings_below_others_are_keys_with_dots():
    settings = {"lr": 1, "peft": {"rank": 8}, "environment": {"math": {}}}
    assert [*flat(settings)] == [("lr", 1), ("peft.rank", 8), ("environment.math", {})]


def test_what_differs_among_several_is_told_for_all_of_them():
    sides = {"lr": 1, "seed": 7}, {"lr": 2, "seed": 7}, {"lr": 1, "seed": 7, "k": {}}
    assert dict(differing(*sides)) == {"lr": [1, 2, 1], "k": [None, None, {}]}
