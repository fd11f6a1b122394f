"""What is kept of a model's answers: only what was rewarded, and all is accounted for."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from scripts.data import curation
from scripts.data.curation import Answer
from scripts.lib.schema import RolloutsRecipe


def recipe(**settings: Any) -> RolloutsRecipe:
    return RolloutsRecipe.model_validate({"max_completion_tokens": 4} | settings)


def answers(*given: tuple[str, float], ended: bool = True) -> list[Answer]:
    return [Answer(text, 2, ended, reward, {"math": reward}) for text, reward in given]


def chats(given: list[Answer], **keep: Any) -> tuple[list[str], Counter[str]]:
    left: Counter[str] = Counter()
    rows = curation.chats("?", given, recipe(filter=keep), left)
    assert all(row["messages"][0]["content"] == "?" for row in rows)
    assert len(rows) + left.total() == len(given), "each is kept or counted"
    return [row["messages"][1]["content"] for row in rows], +left


def pair(given: list[Answer], **keep: Any) -> tuple[tuple[str, str] | None, Any]:
    left: Counter[str] = Counter()
    rows = curation.pairs("?", given, recipe(kind="preferences", filter=keep), left)
    assert 2 * len(rows) + left.total() == len(given), "each is kept or counted"
    return (rows[0]["chosen"], rows[0]["rejected"]) if rows else None, +left


def test_chats_are_those_rewarded_enough_the_best_first():
    given = answers(("a", 0.2), ("b", 1.0), ("c", 0.5), ("d", 1.0))
    assert chats(given, min_reward=0.5) == (["b", "d", "c"], {"below": 1})
    assert chats(given, at_most=1) == (["b"], {"surplus": 3})
    both = chats(given, min_reward=0.5, at_most=2)
    assert both == (["b", "d"], {"below": 1, "surplus": 1})


def test_an_answer_is_kept_once_whatever_blanks_are_around_it():
    given = answers(("42", 1.0), (" 42\n", 1.0), ("42", 1.0), ("43", 1.0))
    assert chats(given, min_reward=1.0) == (["42", "43"], {"duplicates": 2})


def test_cut_and_empty_answers_are_never_kept_whatever_their_reward():
    given = answers(("cut", 1.0), ended=False) + answers((" ", 1.0), ("whole", 0.1))
    left = {"cut": 1, "empty": 1}
    assert chats(given, at_most=3) == (["whole"], left)
    assert pair(given) == (None, left | {"near": 1})


def test_a_failed_environment_is_no_reward_of_zero():
    given = answers(("a", math.nan), ("b", -1.0), ("c", 1.0))
    assert chats(given, min_reward=-2.0) == (["c", "b"], {"failed": 1})
    assert pair(given) == (("c", "b"), {"failed": 1})


def test_a_pair_is_the_best_against_the_worst():
    given = answers(("a", 0.5), ("b", 0.0), ("c", 1.0), ("d", 0.0))
    assert pair(given) == (("c", "d"), {"surplus": 2})
    assert pair(given, margin=1.0) == (("c", "d"), {"surplus": 2})
    assert pair(given, margin=1.5) == (None, {"near": 4})
    assert pair(given, min_reward=2.0) == (None, {"below": 4})


@pytest.mark.parametrize("given", [[], [("a", 1.0)], [("a", 1.0), ("b", 1.0)]])
def test_equally_good_answers_are_no_pair(given: list[tuple[str, float]]):
    assert pair(answers(*given))[0] is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "filter"),
        ({"filter": {"min_reward": 1.0, "margin": 1.0}}, "filter.margin"),
        ({"kind": "preferences", "filter": {"at_most": 1}}, "filter.at_most"),
        ({"kind": "preferences", "samples": 1}, "samples"),
        ({"filter": {"at_most": 1}}, None),
        ({"kind": "preferences"}, None),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    settings: dict[str, Any], key: str | None
):
    found = recipe(**settings).mistake()
    assert (found[0] if found else None) == key
