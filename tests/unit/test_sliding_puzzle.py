"""A puzzle is replayed from the conversation; a solved board is worth 1, once."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.data import generate
from scripts.environments import Messages, Turn
from scripts.environments.sliding_puzzle import (
    BESIDE,
    Board,
    SlidingPuzzle,
    board_row,
    boards,
    slid,
    solved,
    written,
)
from scripts.lib.errors import DataError, UserError
from scripts.lib.schema import Generate

GOAL = "1 2 3\n4 5 6\n7 8 _"
NEAR = {"input": "Solve:\n\n1 2 3\n4 5 6\n_ 7 8\n\nPlease.", "output": GOAL}


def conversation(*turns: str) -> Messages:
    messages = [{"role": "user", "content": "the prompt"}]
    for turn in turns:
        messages.append({"role": "assistant", "content": turn})
        messages.append({"role": "user", "content": "a reply"})
    return messages[:-1]


def act(*actions: str) -> str:
    return "I play " + " ".join(f"<action>{a}</action>" for a in actions)


def step(*turns: str, row: dict[str, str] | None = None, **settings: Any) -> Turn:
    return SlidingPuzzle(**settings).step(conversation(*turns), row or NEAR)


def solution(board: Board, goal: Board) -> list[str]:
    """The fewest moves from one board to another."""
    seen = {board}
    edge: list[tuple[Board, list[str]]] = [(board, [])]
    while edge:
        further = []
        for at, path in edge:
            if at == goal:
                return path
            for action in BESIDE:
                after = slid(at, action)
                if after is not None and after not in seen:
                    seen.add(after)
                    further.append((after, [*path, action]))
        edge = further
    raise AssertionError("cannot be solved")


@pytest.mark.parametrize(
    ("action", "after"),
    [
        ("up", "1 2 3\n4 8 5\n6 _ 7"),
        ("down", "1 _ 3\n4 2 5\n6 8 7"),
        ("left", "1 2 3\n4 5 _\n6 8 7"),
        ("right", "1 2 3\n_ 4 5\n6 8 7"),
    ],
)
def test_an_action_says_where_the_tile_slides(action: str, after: str) -> None:
    row = {"input": "1 2 3\n4 _ 5\n6 8 7", "output": GOAL}
    assert step(act(action), row=row) == Turn(0.0, f"{after}\n\n19 moves left.")


def test_a_solved_board_is_worth_1_in_one_turn_or_several() -> None:
    assert step(act("left", "left")) == Turn(1.0)
    assert step(act("left")) == Turn(0.0, "1 2 3\n4 5 6\n7 _ 8\n\n19 moves left.")
    assert step(act("left"), act("left")) == Turn(1.0)
    assert step("<action> LEFT\n</action><ACTION>left</ACTION>") == Turn(1.0)


def test_what_follows_a_solved_board_changes_nothing() -> None:
    assert step(act("left", "left", "right", "nonsense")) == Turn(1.0)


def test_a_solved_board_counts_once_where_another_environment_goes_on() -> None:
    assert step(act("left", "left"), act("left")) == Turn(0.0)
    assert step(act("left", "left"), act("right"), act("left")) == Turn(0.0)


def test_an_illegal_move_is_said_and_ends_its_turn() -> None:
    turn = step(act("left", "up", "left"), illegal_reward=-0.25)
    assert turn.reward == -0.25
    assert turn.reply is not None
    assert "no tile beside the gap can move up" in turn.reply
    assert "1 2 3\n4 5 6\n7 _ 8" in turn.reply and "18 moves left" in turn.reply
    assert step(act("left", "up", "left"), act("left")) == Turn(1.0)


@pytest.mark.parametrize("said", ["", "left", "<action>", act("away\ud800"), act("")])
def test_a_turn_without_a_move_is_told_how_and_counts_as_one(said: str) -> None:
    turn = step(said, illegal_reward=-1.0)
    assert turn.reward == -1.0
    assert turn.reply is not None
    assert turn.reply.encode()
    assert "1 2 3\n4 5 6\n_ 7 8" in turn.reply and "19 moves left" in turn.reply


def test_the_last_move_may_solve_and_no_later_one() -> None:
    assert step(act("left", "left"), max_moves=2) == Turn(1.0)
    assert step(act("left", "left"), max_moves=1) == Turn(0.0)
    assert step(act("left"), act("right"), max_moves=2) == Turn(0.0)
    assert step("hm", "hm", max_moves=2) == Turn(0.0)
    assert step("hm", "hm", act("left", "left"), max_moves=2) == Turn(0.0)
    turn = step(act("left"), max_moves=2)
    assert turn.reply is not None and turn.reply.endswith("1 move left.")


def test_many_moves_of_one_turn_are_not_played_past_the_most() -> None:
    assert step(act(*["left", "right"] * 50_000)) == Turn(0.0)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shuffles", [1, 5, 12])
def test_rows_can_be_solved_in_as_many_moves_as_they_were_shuffled(
    size: int, shuffles: int
) -> None:
    for seed in range(3):
        row = board_row(size, shuffles, seed)
        board, goal = boards(row)
        assert goal == solved(size) and board != goal
        moves = solution(board, goal)
        assert len(moves) <= shuffles + 1
        assert step(act(*moves), row=row) == Turn(1.0)


def test_a_row_is_its_seeds_and_strings_that_tell_the_rules() -> None:
    assert board_row(3, 6, 1) == board_row(3, 6, 1)
    rows = [board_row(3, 6, seed) for seed in range(20)]
    assert len({row["input"] for row in rows}) > 5
    assert all(set(row) == {"input", "output"} for row in rows)
    assert "<action>up</action>" in rows[0]["input"] and rows[0]["output"] == GOAL
    wide = written(solved(4)).splitlines()
    assert wide[0] == " 1  2  3  4" and wide[3] == "13 14 15  _"


@pytest.mark.parametrize(("size", "shuffles"), [(1, 1), (0, 1), (3, 0)])
def test_no_row_of_no_puzzle(size: int, shuffles: int) -> None:
    with pytest.raises(ValueError, match="no puzzle"):
        board_row(size, shuffles, 0)


@pytest.mark.parametrize(
    ("board", "goal", "said"),
    [
        ("What is 1 + 1?", GOAL, "input: has no board"),
        (NEAR["input"], "42", "output: has no board"),
        ("1 2 3\n4 5 _", GOAL, "no square"),
        ("1 2 3\n4 5 6\n7 7 _", GOAL, "each of 1 to 8"),
        ("1 2 3\n4 5 6\n7 8 9", GOAL, "each of 1 to 8"),
        ("1 2\n3 _", GOAL, "not as large"),
        (GOAL, GOAL, "solved"),
    ],
)
def test_a_row_without_a_puzzle_is_refused(board: str, goal: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        step(act("left"), row={"input": board, "output": goal})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_moves": 0},
        {"max_moves": 2.5},
        {"illegal_reward": "no"},
        {"illegal_reward": float("inf")},
    ],
)
def test_settings_are_refused_by_name(settings: Any) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        SlidingPuzzle(**settings)


def test_generated_puzzles_can_be_solved_within_the_moves_of_a_game() -> None:
    recipe = Generate(kind="puzzles", count=30, max_operand=9, seed=0)
    rows = [*generate.rows(recipe)]
    assert rows == [*generate.rows(recipe)]
    assert rows != [*generate.rows(recipe.model_copy(update={"seed": 1}))]
    for row in rows:
        assert step(act(*solution(*boards(row))), row=row) == Turn(1.0)
