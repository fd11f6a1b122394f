"""Which of several nodes scores best."""

from __future__ import annotations

import math
from collections.abc import Iterable


def ranked(
    scores: Iterable[tuple[str, float]], lowest: bool = False
) -> list[tuple[str, float]]:
    """Nodes and their scores, the best first; equals stay as they came.

    Raises ValueError where one is not finite.
    """
    found = [*scores]
    for id, score in found:
        if not math.isfinite(score):
            raise ValueError(f"{id} scores {score}")
    return sorted(found, key=lambda one: one[1], reverse=not lowest)
