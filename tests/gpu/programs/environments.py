"""Environments of one's own, as a user writes them."""

from __future__ import annotations

from scripts.environments import Messages, Row, Turn


class Brief:
    """Likes short answers."""

    def step(self, messages: Messages, row: Row) -> float:
        return float(len(messages[-1]["content"]) < 9)


class Again:
    """Asks the same once more, and likes to hear the same."""

    def step(self, messages: Messages, row: Row) -> Turn:
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        if len(said) == 1:
            return Turn(0.0, str(row["input"]))
        return Turn(float(said[0] == said[1]))


class Same:
    """Likes everything."""

    def step(self, messages: Messages, row: Row) -> float:
        return 1.0
