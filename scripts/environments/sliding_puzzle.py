"""The environment `sliding_puzzle`: a board put in order is worth 1.

A row's `input` has the board, n lines of n numbers with `_` for the gap, before or after
what tells the rules (its first board counts); its `output` has the board that is wanted. The model answers

    <action>up</action>

and the tile beside the gap that can move up does so; the reply is the new board. Several
actions a turn are played in their order, up to the first that is illegal. Each action is
a move, and so is a turn without one; the game ends when there are no more.

The board is replayed from the row and the model's turns each time. `board_row` makes rows.
"""

from __future__ import annotations

import math
import random
import re
from typing import NamedTuple

from scripts.environments import Messages, Row, Turn
from scripts.lib.errors import DataError, UserError

ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE)
LINE = re.compile(r"[ \t]*(\d+|_)([ \t]+(\d+|_))+[ \t]*")
GAP = 0
BESIDE = {"up": (1, 0), "down": (-1, 0), "left": (0, 1), "right": (0, -1)}
"""Where, from the gap, the tile is that moves there: rows down, columns right."""
RULES = """Solve this sliding puzzle. `_` is the gap; a tile beside it can slide into it.

{board}

Bring it into this order:

{goal}

Answer with moves, one or several: <action>up</action>, <action>down</action>, \
<action>left</action> or <action>right</action>. A move says where the tile slides. You \
will see the board after your moves."""

Board = tuple[tuple[int, ...], ...]


class Game(NamedTuple):
    """A game after some of the model's turns."""

    board: Board
    moves: int
    wrong: str = ""
    """What was wrong with the last turn."""


class SlidingPuzzle:
    """Rewards solved boards."""

    def __init__(self, max_moves: int = 20, illegal_reward: float = 0.0) -> None:
        """`illegal_reward` is that of a turn with an illegal move, or with none.

        Raises UserError where a setting is not of its form.
        """
        where = "environment sliding_puzzle"
        if type(max_moves) is not int or max_moves < 1:
            raise UserError(f"{where} max_moves", f"{max_moves!r} should be 1 or more")
        number = type(illegal_reward) in (int, float) and math.isfinite(illegal_reward)
        if not number:
            raise UserError(
                f"{where} illegal_reward", f"{illegal_reward!r} should be a number"
            )
        self.max_moves, self.illegal_reward = max_moves, illegal_reward

    @staticmethod
    def check_row(row: Row) -> None:
        """Raise DataError for a row that is no puzzle."""
        boards(row)

    def step(self, messages: Messages, row: Row) -> Turn:
        """Play the model's last turn."""
        board, goal = boards(row)
        game = Game(board, 0)
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        for turn in turns[:-1]:
            game = self.played(game, turn, goal)
        if game.board == goal or game.moves >= self.max_moves:
            return Turn(0.0)  # it was over: another environment went on
        game = self.played(game, turns[-1], goal)
        if game.board == goal:
            return Turn(1.0)
        reward = self.illegal_reward if game.wrong else 0.0
        left = self.max_moves - game.moves
        if left <= 0:
            return Turn(reward)
        said = f"{game.wrong}\n\n" if game.wrong else ""
        told = f"{left} move{'s' if left > 1 else ''} left."
        return Turn(reward, f"{said}{written(game.board)}\n\n{told}")

    def played(self, game: Game, turn: str, goal: Board) -> Game:
        """A game after a turn of the model, as far as it could be played."""
        board, moves, _ = game
        actions = [action.strip().lower() for action in ACTION.findall(turn)]
        if not actions:
            what = "There is no move in your answer: write <action>up</action>."
            return Game(board, moves + 1, what)
        for action in actions:
            if board == goal or moves >= self.max_moves:
                break
            moves += 1
            if action not in BESIDE:
                return Game(board, moves, "A move is up, down, left or right.")
            after = slid(board, action)
            if after is None:
                what = f"Illegal move: no tile beside the gap can move {action}."
                return Game(board, moves, what)
            board = after
        return Game(board, moves)


def slid(board: Board, action: str) -> Board | None:
    """The board after a tile has moved into the gap; None where none can."""
    tiles = [list(line) for line in board]
    gap = next(
        (r, c) for r, line in enumerate(board) for c, t in enumerate(line) if not t
    )
    down, right = BESIDE[action]
    row, column = gap[0] + down, gap[1] + right
    if not (0 <= row < len(board) and 0 <= column < len(board)):
        return None
    tiles[gap[0]][gap[1]], tiles[row][column] = tiles[row][column], GAP
    return tuple(tuple(line) for line in tiles)


def boards(row: Row) -> tuple[Board, Board]:
    """A row's board and the one that is wanted. Raises DataError."""
    where = f"row {str(row.get('input', ''))[:60]!r}"
    goal = read(str(row.get("output", "")), f"{where} output")
    board = read(str(row.get("input", "")), f"{where} input")
    if len(board) != len(goal):
        raise DataError(where, "its `output` is not as large as its board")
    if board == goal:
        raise DataError(where, "its board is solved", "take the row out")
    return board, goal


def read(text: str, where: str) -> Board:
    """The first board of a text. Raises DataError where there is none."""
    hint = "write it as lines of numbers with `_` for the gap, as board_row does"
    lines: list[tuple[int, ...]] = []
    for line in [*text.splitlines(), ""]:
        if LINE.fullmatch(line):
            lines.append(tuple(GAP if t == "_" else int(t) for t in line.split()))
        elif lines:
            break
    if not lines:
        raise DataError(where, "has no board", hint)
    board, size = tuple(lines), len(lines)
    if any(len(line) != size for line in board):
        raise DataError(where, "its board is no square", hint)
    if sorted(tile for line in board for tile in line) != [*range(size * size)]:
        raise DataError(
            where,
            f"its board has not each of 1 to {size * size - 1} and `_` once",
            hint,
        )
    return board


def written(board: Board) -> str:
    """A board as text: numbers right-aligned, `_` the gap."""
    width = len(str(len(board) ** 2 - 1))
    return "\n".join(
        " ".join(("_" if tile == GAP else str(tile)).rjust(width) for tile in line)
        for line in board
    )


def solved(size: int) -> Board:
    """The board in order, the gap last."""
    tiles = [*range(1, size * size), GAP]
    return tuple(tuple(tiles[at : at + size]) for at in range(0, size * size, size))


def board_row(size: int, shuffles: int, seed: int | str) -> dict[str, str]:
    """A row whose board is at most so many moves from the solved one.

    Another move follows where they came round to it. No move undoes the one before.
    """
    if size < 2 or shuffles < 1:
        raise ValueError(f"no puzzle of size {size} with {shuffles} moves")
    rng = random.Random(seed)
    goal = solved(size)
    before, board, moved = goal, goal, 0
    while moved < shuffles or board == goal:
        ways = [slid(board, action) for action in BESIDE]
        ahead = [way for way in ways if way is not None and way != before]
        before, board, moved = board, rng.choice(ahead), moved + 1
    text = RULES.format(board=written(board), goal=written(goal))
    return {"input": text, "output": written(goal)}
