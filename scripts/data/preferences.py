r"""Split pairs of answers, one preferred, into a train and a validation set.

Reads   --tokenizer  Hugging Face tokenizer folder with a chat template
        --data       NAME=PATH, repeated: rows with `prompt`, `chosen` and
                     `rejected`. `prompt` is text, or a list of {role: system,
                     user, assistant or tool; content} that ends with the user's
                     turn. `chosen` and `rejected` are texts, the assistant's
                     answers; or whole conversations that share all but the last
                     message, where `prompt` may be left out
        --recipe     YAML of one `preferences:` node
Writes  --out        train.jsonl, validation.jsonl  a line: messages (a list of
                                       role, content), chosen, rejected
                     preferences.json  train, validation, duplicates,
                                       conflicting (rows that say the reverse of
                                       another), equal (dropped), too_long,
                                       bad_rows, longest_tokens
Raises  DataError for bad rows (an empty answer among them), for pairs with equal
        sides unless drop_equal, and for a pair of which a conversation with its
        answer is longer than max_tokens
Resumes never: it starts again

A pair that comes twice is kept once; one and its reverse are both kept. All pairs
of a prompt are in one set: validation_fraction is a share of the prompts. Sides are
equal where the chat template renders them alike, as one that trims does with blanks.

    python -m scripts.data.preferences --tokenizer T --data sums=rows.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from scripts.data.chats import load_tokenizer
from scripts.data.prompts import (
    NAMED,
    Batches,
    refuse_long_ones,
    split,
    write_lines,
)
from scripts.lib import cli
from scripts.lib.errors import DataError
from scripts.lib.rows import BadRow, Row, field
from scripts.lib.schema import PreferencesRecipe

ROLES = ("system", "user", "assistant", "tool")
KEPT = ("role", "content")
COLUMNS = "`prompt`, `chosen` and `rejected`"

Messages = tuple[tuple[str, str], ...]  # role and content of each


class Pair(NamedTuple):
    """Two answers to one conversation."""

    messages: Messages
    chosen: str
    rejected: str


def main(argv: list[str] | None = None) -> int:
    """Read, measure, split and write."""
    args = cli.parse_rows(__doc__, argv)
    recipe = cli.load_recipe(args.recipe, PreferencesRecipe)
    tokenizer = load_tokenizer(args.tokenizer)
    pairs, counts = read(recipe, args, tokenizer)
    train, validation = split_by_prompt(pairs, recipe)
    for name, part in (("train", train), ("validation", validation)):
        write_lines(map(line, part), args.out / f"{name}.jsonl")
    counts = {"train": len(train), "validation": len(validation), **counts}
    (args.out / "preferences.json").write_text(json.dumps(counts, indent=2) + "\n")
    return 0


def read(
    recipe: PreferencesRecipe, args: argparse.Namespace, tokenizer: Any
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs in reading order, each once, and what was met on the way."""
    pairs: dict[Pair, None] = {}
    equal: list[str] = []
    too_long: list[str] = []
    duplicates = conflicting = longest = 0
    take = partial(rendered_pair, tokenizer=tokenizer)
    batches = Batches(recipe, args, take, "preferences", COLUMNS)
    for batch in batches.read(pairs=pairs):
        texts = [text for (_, both), _ in batch for text in both]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for (pair, _), where in batch:
            chosen, rejected = next(ids), next(ids)
            if chosen == rejected:
                equal.append(where)
                continue
            tokens = max(len(chosen), len(rejected))
            longest = max(longest, tokens)
            if tokens > recipe.max_tokens:
                too_long.append(f"{where}: {tokens} tokens")
            elif pair in pairs:
                duplicates += 1
            else:
                conflicting += Pair(pair.messages, pair.rejected, pair.chosen) in pairs
                pairs[pair] = None
    refuse_equal_ones(equal, recipe, bool(pairs or too_long))
    refuse_long_ones("pairs", too_long, "max_tokens", recipe.max_tokens, longest)
    return list(pairs), {
        "duplicates": duplicates,
        "conflicting": conflicting,
        "equal": len(equal),
        "too_long": len(too_long),
        "bad_rows": batches.num_bad,
        "longest_tokens": longest,
    }


def refuse_equal_ones(
    equal: list[str], recipe: PreferencesRecipe, others: bool
) -> None:
    """Raise DataError for pairs with equal sides, unless they may be dropped."""
    if equal and not recipe.drop_equal:
        raise DataError(
            "`chosen` and `rejected`",
            f"{len(equal)} pairs, rendered as chats, have equal sides:\n  "
            + "\n  ".join(equal[:NAMED]),
            "`drop_equal: true` drops and counts them",
        )
    if equal and not others:
        raise DataError("`drop_equal`", f"all {len(equal)} pairs have equal sides")


# --- what a row holds ---------------------------------------------------------


def rendered_pair(row: Row, tokenizer: Any) -> tuple[Pair, list[str]]:
    """A row's pair, and its two conversations as text. Raises BadRow."""
    from jinja2 import TemplateError

    pair = pair_of(row)
    chats = [
        as_dicts((*pair.messages, ("assistant", answer)))
        for answer in (pair.chosen, pair.rejected)
    ]
    try:
        return pair, tokenizer.apply_chat_template(chats, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRow(f"the chat template refuses it: {error}") from error


def pair_of(row: Row) -> Pair:
    """A row's pair, of either form. Raises BadRow where it is of none."""
    if isinstance(row.get("chosen"), list):
        before, chosen = last_apart(row, "chosen")
        before_rejected, rejected = last_apart(row, "rejected")
        if before != before_rejected:
            raise BadRow("`chosen` and `rejected` differ before their last message")
        messages = prompt_before(row, before)
    else:
        messages = prompt_of(row)
        chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if not messages or messages[-1][0] != "user":
        raise BadRow("the last message before the answers is not the user's")
    if not messages[-1][1].strip():
        raise BadRow("the user's last message is empty")
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRow(f"the answer is empty (column `{column}`)")
    return Pair(messages, chosen, rejected)


def prompt_of(row: Row) -> Messages:
    """The messages of a row's column `prompt`."""
    if isinstance(row.get("prompt"), list):
        return messages_of(row, "prompt")
    return (("user", field(row, "prompt")),)


def prompt_before(row: Row, shared: Messages) -> Messages:
    """The messages before answers that are conversations.

    A text as `prompt` may be any of the user's messages: data sets differ in which.
    """
    given = row.get("prompt")
    if not shared or not given:
        return shared or prompt_of(row)
    if isinstance(given, str):
        agrees = given.strip() in [
            said.strip() for role, said in shared if role == "user"
        ]
    else:
        agrees = prompt_of(row) == shared
    if not agrees:
        raise BadRow("column `prompt` is not what `chosen` and `rejected` answer")
    return shared


def last_apart(row: Row, column: str) -> tuple[Messages, str]:
    """A conversation without its last message, and what the assistant says in that."""
    messages = messages_of(row, column)
    if not messages or messages[-1][0] != "assistant":
        raise BadRow(f"the last message of `{column}` is not the assistant's")
    return messages[:-1], messages[-1][1]


def messages_of(row: Row, column: str) -> Messages:
    """A column's messages. Raises BadRow for one of which a part would be lost."""
    messages = []
    for number, message in enumerate(field(row, column, list), 1):
        where = f"message {number} of `{column}`"
        if not isinstance(message, dict):
            raise BadRow(f"{where} is no object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRow(f"{where} has role {role!r}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"{where} ({role}) has no text as content")
        lost = [key for key, value in message.items() if value and key not in KEPT]
        if lost:
            raise BadRow(f"{where} has `{lost[0]}`; only role and content are read")
        messages.append((role, content))
    return tuple(messages)


# --- what is written ----------------------------------------------------------


def split_by_prompt(
    pairs: list[Pair], recipe: PreferencesRecipe
) -> tuple[list[Pair], list[Pair]]:
    """Train and validation, shuffled; no prompt has pairs in both."""
    prompts = dict.fromkeys(pair.messages for pair in pairs)
    held = set(split(list(prompts), recipe)[1])
    pairs = list(pairs)
    random.Random(recipe.seed).shuffle(pairs)
    return (
        [pair for pair in pairs if pair.messages not in held],
        [pair for pair in pairs if pair.messages in held],
    )


def line(pair: Pair) -> dict[str, Any]:
    """A pair as a line of the result."""
    return pair._asdict() | {"messages": as_dicts(pair.messages)}


def as_dicts(messages: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Messages as chat templates take them."""
    return [{"role": role, "content": content} for role, content in messages]


if __name__ == "__main__":
    cli.run(main)
