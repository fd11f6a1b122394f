"""Environments of reinforcement learning: they answer a model and reward it.

One of your own is a class in a file of the project, named in a config by
`environment: {mine: {import: "environments.length:Short"}}`:

    class Short:
        def __init__(self, **settings): self.most = settings.get("most", 20)

        def step(self, messages, row):
            words = len(messages[-1]["content"].split())
            return float(words <= self.most)

`messages` is the conversation so far, [{"role", "content"}], the model's turn last; `row`
the prompt's row, with `input` and `output`. A step returns the reward alone, which ends
the conversation, or a `Turn` whose reply the model is to answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

Messages = list[dict[str, str]]
Row = dict[str, Any]


class Turn(NamedTuple):
    """What an environment makes of a model's turn."""

    reward: float
    reply: str | None = None
    """The environment's own turn; None ends the conversation."""


class Environment(Protocol):
    """Whatever rewards a model's turns; conversations are all it is told of them."""

    def step(self, messages: Messages, row: Row) -> Turn | float:
        """Judge the last message, which is the model's."""
        ...
