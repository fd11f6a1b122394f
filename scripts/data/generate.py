"""Make data: arithmetic for every stage, or sliding puzzles (CPU).

Whether a pair of operands is held out is decided by a hash of the pair alone: no
seed, count or kind moves it, and no held-out sum, in either order, is ever stated
or asked in documents, chats, prompts or preferences.

Chats are as people write them: in most sums that carry, the answer forgets to. A
model that imitates them forgets too; checked answers (GRPO), or such an answer beside
the right one (DPO), can teach it better. A preference's `rejected` is always wrong.
Documents, prompts and held-out items hold right answers only.

Puzzles are for the environment `sliding_puzzle`; easy ones may come twice.

Reads   --recipe  YAML of one `generate:` node
Writes  --out     rows.jsonl: {"text"}, {"messages"}, {"input", "output"},
                  or {"prompt", "chosen", "rejected"}
Raises  RecipeError where fewer held-out items exist than are asked for
Resumes never: it takes seconds. The same recipe gives the same bytes.

    python -m scripts.data.generate --recipe R.yaml --out work/try
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from scripts.environments.sliding_puzzle import board_row
from scripts.lib import cli
from scripts.lib.errors import RecipeError
from scripts.lib.schema import Generate

HELD_OUT_SHARE = 8
CARRY_FORGOTTEN = 0.65
SLIPS = (-10, -1, 1, 10)
PUZZLE_SIZE = 3
PUZZLE_MOVES = 12
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon")
THINGS = ("apples", "books", "coins", "eggs", "figs", "keys", "nuts", "pens", "shells")
QUESTIONS = (
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
)
SUMS = (
    "{a} + {b} = {c}",
    "{a} + {b} = {c}",
    "{a} plus {b} is {c}",
    "The sum of {a} and {b} is {c}",
    "If you add {a} and {b}, you get {c}",
)
STORIES = (
    "{name} has {a} {things}. {other} brings {b} more. Now there are {c} {things}.",
    "{name} counts {a} {things} and {b} {others}. Together they are {c}.",
    "There are {a} {things} in a box. {name} puts in {b}. The box holds {c} {things}.",
    "{name} and {other} have {a} and {b} {things}. In all they have {c}.",
)
GREETINGS = (
    ("Hello!", "Hello! Ask me for a sum."),
    ("Who are you?", "I am a tiny model that adds."),
    ("Thank you.", "You are welcome."),
    ("What can you do?", "I can add and compare numbers."),
)


def held_out(a: int, b: int) -> bool:
    """Whether the sum of `a` and `b` is kept from all training data."""
    pair = f"{min(a, b)}+{max(a, b)}".encode()
    return hashlib.sha256(pair).digest()[0] % HELD_OUT_SHARE == 0


def operands(rng: random.Random, largest: int) -> tuple[int, int]:
    """Two operands of a sum that training may show."""
    while True:
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        if not held_out(a, b):
            return a, b


def question(a: int, b: int) -> str:
    """The wording a pair is asked in; by hash, so held-out items keep theirs."""
    digest = hashlib.sha256(f"{a} ask {b}".encode()).digest()
    return QUESTIONS[digest[0] % len(QUESTIONS)].format(a=a, b=b)


def notation(rng: random.Random, largest: int) -> str:
    """A line of sums, some of them turned round."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        a, b = operands(rng, largest)
        template = rng.choice(SUMS)
        parts.append(template.format(a=a, b=b, c=a + b) + ".")
        if rng.random() < 0.3:
            parts.append(template.format(a=b, b=a, c=a + b) + ".")
    return " ".join(parts)


def story(rng: random.Random, largest: int) -> str:
    """A sum as a short story."""
    a, b = operands(rng, largest)
    name, other = rng.sample(NAMES, 2)
    things, others = rng.sample(THINGS, 2)
    return rng.choice(STORIES).format(
        a=a, b=b, c=a + b, name=name, other=other, things=things, others=others
    )


def counting(rng: random.Random, largest: int) -> str:
    """Numbers in order, up or down."""
    count = rng.randint(4, 8)
    first = rng.randint(0, max(2 * largest - count, 0))
    numbers = [str(first + i) for i in range(count)]
    if rng.random() < 0.5:
        return f"Counting up: {', '.join(numbers)}."
    return f"Counting down: {', '.join(reversed(numbers))}."


def comparing(rng: random.Random, largest: int) -> str:
    """Which of two numbers is larger."""
    low, high = sorted(rng.sample(range(2 * largest + 1), 2))
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    return rng.choice(
        (
            f"{high} is larger than {low}.",
            f"{low} is smaller than {high}.",
            f"{name} has {low} {things}, {other} has {high}. {other} has more.",
        )
    )


def document(rng: random.Random, largest: int) -> dict[str, Any]:
    """One document: a few sentences of one kind or several."""
    kinds: list[Callable[[random.Random, int], str]] = rng.choices(
        (notation, story, counting, comparing),
        weights=(5, 3, 1, 1),
        k=rng.randint(1, 3),
    )
    return {"text": "\n".join(kind(rng, largest) for kind in kinds)}


def carries(a: int, b: int) -> bool:
    """Whether the sum of the last digits has two."""
    return a % 10 + b % 10 >= 10


def answered(rng: random.Random, a: int, b: int) -> int:
    """A sum as somebody answers it, who often forgets to carry."""
    forgotten = carries(a, b) and rng.random() < CARRY_FORGOTTEN
    return a + b - 10 if forgotten else a + b


def mistaken(rng: random.Random, a: int, b: int) -> int:
    """A wrong sum: the carry is forgotten, or else it is off by one or ten."""
    if carries(a, b):
        return a + b - 10
    return rng.choice([c for c in (a + b + off for off in SLIPS) if c >= 0])


def chat(rng: random.Random, largest: int) -> dict[str, Any]:
    """One chat of a question and its answer, mostly a sum."""
    draw = rng.random()
    if draw < 0.90:
        a, b = operands(rng, largest)
        asked = rng.choice(QUESTIONS).format(a=a, b=b)
        answer = str(answered(rng, a, b))
    elif draw < 0.97:
        low, high = sorted(rng.sample(range(2 * largest + 1), 2))
        first, second = rng.sample((low, high), 2)
        asked, answer = f"Which is larger, {first} or {second}?", str(high)
    else:
        asked, answer = rng.choice(GREETINGS)
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


def prompt(rng: random.Random, largest: int) -> dict[str, Any]:
    """One question with its checkable answer."""
    a, b = operands(rng, largest)
    return {"input": rng.choice(QUESTIONS).format(a=a, b=b), "output": str(a + b)}


def preference(rng: random.Random, largest: int) -> dict[str, Any]:
    """One question with its right answer and a wrong one."""
    a, b = operands(rng, largest)
    return {
        "prompt": rng.choice(QUESTIONS).format(a=a, b=b),
        "chosen": str(a + b),
        "rejected": str(mistaken(rng, a, b)),
    }


def puzzle(rng: random.Random, largest: int) -> dict[str, Any]:
    """One sliding puzzle, a few moves from solved; `largest` has no say in it."""
    return board_row(PUZZLE_SIZE, rng.randint(1, PUZZLE_MOVES), rng.getrandbits(32))


def heldout(rng: random.Random, largest: int, count: int) -> list[dict[str, Any]]:
    """`count` distinct held-out items, both orders of a pair among them."""
    numbers = range(largest + 1)
    items = [(a, b) for a in numbers for b in numbers if held_out(a, b)]
    if len(items) < count:
        raise RecipeError(
            "count",
            f"{count} held-out items asked for, {len(items)} exist",
            f"ask for at most {len(items)}, or raise max_operand",
        )
    return [
        {"input": question(a, b), "output": str(a + b)}
        for a, b in rng.sample(items, count)
    ]


def rows(recipe: Generate) -> Iterator[dict[str, Any]]:
    """The recipe's rows in order."""
    rng = random.Random(f"{recipe.kind} {recipe.seed}")
    if recipe.kind == "heldout":
        yield from heldout(rng, recipe.max_operand, recipe.count)
        return
    make = {
        "documents": document,
        "chats": chat,
        "prompts": prompt,
        "preferences": preference,
        "puzzles": puzzle,
    }[recipe.kind]
    for _ in range(recipe.count):
        yield make(rng, recipe.max_operand)


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    args = cli.parse(cli.parser(__doc__), argv)
    recipe = cli.load_recipe(args.recipe, Generate)
    with open(args.out / "rows.jsonl", "w", encoding="utf-8") as file:
        for row in rows(recipe):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
