"""A reward of one's own that a tiny model can learn in a few steps."""

from __future__ import annotations

from typing import Any


class Digits:
    """Rewards answers of digits alone."""

    def step(self, messages: list[dict[str, str]], row: dict[str, Any]) -> float:
        """The share of digits in the last message."""
        answer = messages[-1]["content"]
        return sum(map(str.isdecimal, answer)) / max(1, len(answer))
