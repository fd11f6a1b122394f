"""Settings as flat keys: which differ, and how one would write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def shown(value: object) -> str:
    """A setting as one would write it: 1.0e-5, not 1e-05."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value!r}".partition("e")
        if exponent:
            mantissa += "" if "." in mantissa else ".0"
            return f"{mantissa}e{int(exponent)}"
    return "unset" if value is None else str(value)


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Settings as (key, value), keys below others with a dot."""
    if isinstance(value, dict) and (value or not at):
        for key, below in value.items():
            yield from flat(below, f"{at}.{key}" if at else str(key))
    else:
        yield at, value


def differing(*sides: Any) -> Iterator[tuple[str, list[Any]]]:
    """Each key whose values are not the same on all sides; None where unset."""
    found = [dict(flat(side)) for side in sides]
    for key in dict.fromkeys(key for side in reversed(found) for key in side):
        values = [side.get(key) for side in found]
        if any(value != values[0] for value in values):
            yield key, values
