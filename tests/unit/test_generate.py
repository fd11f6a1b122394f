"""What generated data promise, above all that held-out sums stay held out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from scripts.data import generate
from scripts.lib.errors import RecipeError
from scripts.lib.schema import Generate

CONFIG = YAML(typ="safe").load(Path(__file__).parents[2] / "config" / "config.yaml")
DEFAULTS = [Generate(**node) for node in CONFIG["generate"].values()]
HELD_OUT = [recipe for recipe in DEFAULTS if recipe.kind == "heldout"]
PREFERENCES = Generate(kind="preferences", count=4000, max_operand=49)
TRAINING = [*(recipe for recipe in DEFAULTS if recipe.kind != "heldout"), PREFERENCES]

# Any two numbers that a text may put together: with at most a few words, a sign, or
# a sentence's end between, but not in a list, a comparison, or across lines.
PAIR = re.compile(r"(?<!\d)(\d+)(?!\d)(?=([^\d\n]{1,60})(?<!\d)(\d+)(?!\d))")
NOT_A_SUM = re.compile(
    r"^, $|larger|smaller|, .* has | or |=|is |get |Now|Together|holds|In all"
    r"|^\. (The|If|$)"
)


def text_of(row: dict[str, Any]) -> list[str]:
    if "text" in row:
        return list(row["text"].splitlines())
    if "messages" in row:
        return [row["messages"][0]["content"]]
    return [row["input"] if "input" in row else row["prompt"]]


def pairs(text: str) -> set[tuple[int, int]]:
    found = set()
    for match in PAIR.finditer(text):
        a, between, b = int(match[1]), match[2], int(match[3])
        if not NOT_A_SUM.search(between):
            found.add((min(a, b), max(a, b)))
    return found


def operands_of(row: dict[str, str]) -> tuple[int, int]:
    a, b = map(int, re.findall(r"\d+", *text_of(row)))
    return min(a, b), max(a, b)


def test_pairs_are_found_in_every_wording() -> None:
    for template in generate.QUESTIONS + generate.SUMS + generate.STORIES:
        text = template.format(
            a=12, b=30, c=42, name="Ada", other="Ben", things="figs", others="nuts"
        )
        assert (12, 30) in pairs(text), text


def test_no_heldout_item_occurs_in_training_text_in_either_order() -> None:
    kept = {operands_of(row) for recipe in HELD_OUT for row in generate.rows(recipe)}
    assert kept
    seen: set[tuple[int, int]] = set()
    for recipe in TRAINING:
        for row in generate.rows(recipe):
            for line in text_of(row):
                stated = pairs(line)
                assert not stated & kept, line
                seen |= stated
    assert len(seen) > 5 * len(kept) / 2


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_show_no_heldout_item_either(seed: int) -> None:
    for recipe in TRAINING:
        other = recipe.model_copy(update={"seed": seed, "count": 500})
        for row in generate.rows(other):
            for line in text_of(row):
                for a, b in pairs(line):
                    sum_of_operands = max(a, b) <= recipe.max_operand
                    assert not (sum_of_operands and generate.held_out(a, b)), line


def test_every_answer_is_right() -> None:
    for recipe in DEFAULTS:
        if recipe.kind in ("prompts", "heldout"):
            for row in generate.rows(recipe):
                assert sum(operands_of(row)) == int(row["output"])


@pytest.mark.parametrize("max_operand", [0, 1, 9, 49, 99])
def test_chosen_is_right_and_rejected_a_slip_of_the_careless(max_operand: int) -> None:
    recipe = PREFERENCES.model_copy(update={"max_operand": max_operand})
    seen = set()
    for row in generate.rows(recipe):
        a, b = operands_of(row)
        slip = int(row["rejected"]) - int(row["chosen"])
        assert int(row["chosen"]) == a + b
        assert int(row["rejected"]) >= 0
        carries = a % 10 + b % 10 >= 10
        assert slip == -10 if carries else abs(slip) in (1, 10)
        seen.add((carries, slip))
    if max_operand >= 49:
        assert seen == {(True, -10), *((False, n) for n in (-10, -1, 1, 10))}


def test_preferences_ask_as_prompts_do() -> None:
    def wordings(kind: str) -> set[str]:
        recipe = PREFERENCES.model_copy(update={"kind": kind})
        texts = (*map(text_of, generate.rows(recipe)),)
        return {re.sub(r"\d+", "N", text) for (text,) in texts}

    assert len(wordings("preferences")) == len(generate.QUESTIONS)
    assert wordings("preferences") == wordings("prompts")


def test_heldout_items_are_distinct_and_as_many_as_asked_for() -> None:
    for recipe in HELD_OUT:
        items = [row["input"] for row in generate.rows(recipe)]
        assert len(set(items)) == len(items) == recipe.count


def test_too_many_heldout_items_is_an_error_that_says_how_many_exist() -> None:
    with pytest.raises(RecipeError, match="exist"):
        list(generate.rows(Generate(kind="heldout", count=10**6)))


def test_same_recipe_gives_same_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{kind: documents, count: 50}")
    for name in ("a", "b"):
        generate.main(["--recipe", str(recipe), "--out", str(tmp_path / name)])
    first = (tmp_path / "a" / "rows.jsonl").read_bytes()
    assert first == (tmp_path / "b" / "rows.jsonl").read_bytes()
    assert all(json.loads(line)["text"] for line in first.splitlines())
