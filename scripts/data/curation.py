"""What is kept of a model's rewarded answers: chats for SFT, or pairs for DPO."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

from scripts.lib.schema import RolloutsRecipe

Rows = list[dict[str, Any]]

LEFT_OUT = {
    "failed": "without a reward",
    "cut": "cut at max_completion_tokens",
    "empty": "empty",
    "duplicates": "duplicates",
    "below": "below min_reward",
    "near": "of prompts whose best is too near their worst",
    "surplus": "more than are kept of a prompt",
}
"""Why answers are not kept, and how that is said."""


class Answer(NamedTuple):
    """A model's answer to a prompt, and what it is worth."""

    text: str
    num_tokens: int
    ended: bool
    """Whether the model ended it, rather than the limit on its length."""
    reward: float
    """Not a number where an environment failed."""
    each: dict[str, float]
    """Each environment's reward, before its weight."""

    @property
    def is_rewarded(self) -> bool:
        return math.isfinite(self.reward)


def usable(answers: list[Answer], left: Counter[str]) -> list[Answer]:
    """The answers that could be learned from, best first; `left` counts the others.

    Of equally good ones the first that was sampled comes first. Answers that differ
    by blanks around them are one.
    """
    found: dict[str, Answer] = {}
    for answer in answers:
        text = answer.text.strip()
        why = (
            "failed" if not answer.is_rewarded
            else "cut" if not answer.ended
            else "empty" if not text
            else "duplicates" if text in found
            else ""
        )  # fmt: skip
        if why:
            left[why] += 1
        else:
            found[text] = answer
    return sorted(found.values(), key=lambda answer: -answer.reward)


def chats(
    prompt: str, answers: list[Answer], recipe: RolloutsRecipe, left: Counter[str]
) -> Rows:
    """A chat for each answer that is good enough, of the best ones."""
    wanted = recipe.filter
    given = usable(answers, left)
    good = [a for a in given if is_good(a, recipe)]
    kept = good[: wanted.at_most]
    left["below"] += len(given) - len(good)
    left["surplus"] += len(good) - len(kept)
    asked = {"role": "user", "content": prompt}
    return [
        {"messages": [asked, {"role": "assistant", "content": answer.text}]}
        for answer in kept
    ]


def pairs(
    prompt: str, answers: list[Answer], recipe: RolloutsRecipe, left: Counter[str]
) -> Rows:
    """The best answer against the worst, where it is good enough and better enough."""
    given = usable(answers, left)
    if not given or not is_good(given[0], recipe):
        left["below"] += len(given)
        return []
    best, worst = given[0], given[-1]
    margin = best.reward - worst.reward
    if margin <= 0 or margin < (recipe.filter.margin or 0.0):
        left["near"] += len(given)
        return []
    left["surplus"] += len(given) - 2
    return [{"prompt": prompt, "chosen": best.text, "rejected": worst.text}]


def is_good(answer: Answer, recipe: RolloutsRecipe) -> bool:
    """Whether an answer's reward is the least that is asked for, or more."""
    least = recipe.filter.min_reward
    return least is None or answer.reward >= least
