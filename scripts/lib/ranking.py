"""Which of several nodes scores best."""

from __future__ import annotations

import math
from collections.abc import Iterable


def is_loss(key: str) -> bool:
    """Whether less of it is better."""
    return "loss" in key


def ranked(scores: Iterable[tuple[str, float]], key: str) -> list[tuple[str, float]]:
    """Nodes and their scores of `key`, the best first; equals as they came.

    Raises ValueError where one is not finite.
    """
    found = [*scores]
    for id, score in found:
        if not math.isfinite(score):
            raise ValueError(f"{id} has {key} {score}")
    return sorted(found, key=lambda one: one[1], reverse=not is_loss(key))
