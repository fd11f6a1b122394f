"""Rewards of one's own that a tiny model can learn in a few steps."""

from __future__ import annotations

from typing import Any

from scripts.environments import Turn


class Digits:
    """Rewards answers of digits alone."""

    def step(self, messages: list[dict[str, str]], row: dict[str, Any]) -> float:
        """The share of digits in the last message."""
        answer = messages[-1]["content"]
        return sum(map(str.isdecimal, answer)) / max(1, len(answer))


class Twice(Digits):
    """Asks again; only what the second answer is counts."""

    def step(self, messages: list[dict[str, str]], row: dict[str, Any]) -> Any:
        """A reply to the first answer, the share of digits in the second."""
        turns = [message for message in messages if message["role"] == "assistant"]
        if len(turns) == 1:
            return Turn(0.0, f"Not {row['output']}?")
        return super().step(messages, row)
