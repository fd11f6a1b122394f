r"""Split prompts with checkable answers into a train and a validation set for RL.

Reads   --tokenizer  Hugging Face tokenizer folder with a chat template
        --data       NAME=PATH, repeated: rows with `input` and `output`
        --recipe     YAML of one `prompts:` node
Writes  --out        train.jsonl, validation.jsonl  a line: input, output
                     prompts.json  train, validation, duplicates (of which
                                   conflicting: another answer), bad_rows,
                                   longest_prompt_tokens
Raises  DataError for bad rows (no answer among them), and for a prompt that is
        longer than max_prompt_tokens once rendered as a chat
Resumes never: it starts again

A prompt that comes twice is kept once, with its first answer.

    python -m scripts.data.prompts --tokenizer T --data arithmetic=rows.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from scripts.data.chats import load_tokenizer
from scripts.lib import cli
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.progress import Progress
from scripts.lib.rows import BadRow, Row, field, named_sources, read_rows
from scripts.lib.schema import PreferencesRecipe, PromptsRecipe

BATCH_ROWS = 512
NAMED = 5

Item = TypeVar("Item")


def main(argv: list[str] | None = None) -> int:
    """Read, measure, split and write."""
    args = cli.parse_rows(__doc__, argv)
    recipe = cli.load_recipe(args.recipe, PromptsRecipe)
    tokenizer = load_tokenizer(args.tokenizer)
    answers, counts = read(recipe, args, tokenizer)
    train, validation = split(list(answers.items()), recipe)
    for name, pairs in (("train", train), ("validation", validation)):
        write_lines(
            ({"input": prompt, "output": answer} for prompt, answer in pairs),
            args.out / f"{name}.jsonl",
        )
    counts = {"train": len(train), "validation": len(validation), **counts}
    (args.out / "prompts.json").write_text(json.dumps(counts, indent=2) + "\n")
    return 0


def read(
    recipe: PromptsRecipe, args: argparse.Namespace, tokenizer: Any
) -> tuple[dict[str, str], dict[str, int]]:
    """Answers by prompt, in reading order, and what was met on the way."""
    answers: dict[str, str] = {}
    too_long: list[str] = []
    duplicates = conflicting = longest = 0
    batches = Batches(
        recipe, args, prompt_and_answer, "prompts", "`input` and `output`"
    )
    for batch in batches.read(prompts=answers):
        lengths = prompt_tokens([prompt for (prompt, _), _ in batch], tokenizer)
        for tokens, ((prompt, answer), where) in zip(lengths, batch, strict=True):
            longest = max(longest, tokens)
            if tokens > recipe.max_prompt_tokens:
                too_long.append(f"{where}: {tokens} tokens")
            elif prompt in answers:
                duplicates += 1
                conflicting += answers[prompt] != answer
            else:
                answers[prompt] = answer
    refuse_long_ones(
        "prompts", too_long, "max_prompt_tokens", recipe.max_prompt_tokens, longest
    )
    return answers, {
        "duplicates": duplicates,
        "conflicting": conflicting,
        "bad_rows": batches.num_bad,
        "longest_prompt_tokens": longest,
    }


class Batches(Generic[Item]):
    """What `take` makes of all sources' rows, some at a time; counts bad rows."""

    def __init__(
        self,
        recipe: PromptsRecipe | PreferencesRecipe,
        args: argparse.Namespace,
        take: Callable[[Row], Item],
        stage: str,
        columns: str,
    ) -> None:
        self.sources = named_sources(recipe.sources, cli.named_paths(args.data))
        self.progress = Progress(args.work)
        self.take, self.num_bad = take, 0
        for name, source, _ in self.sources:
            if source.column is not None:
                raise RecipeError(
                    f"data.{name}.column", f"{stage} read the columns {columns}"
                )

    def read(self, **kept: Collection[Any]) -> Iterator[list[tuple[Item, str]]]:
        """Batches of `(take(row), "file:line")`; reports how many are `kept`."""
        done = 0
        for name, source, paths in self.sources:
            rows = read_rows(name, source, paths, self.take)
            items = iter(rows)
            while batch := list(islice(items, BATCH_ROWS)):
                yield batch
                self._report(
                    done + rows.bytes_read,
                    done + max(rows.bytes_total, rows.bytes_read) + 1,
                    kept,
                )
            self.num_bad += rows.num_bad
            done += rows.bytes_total
        self._report(max(1, done), max(1, done), kept)

    def _report(self, step: int, steps: int, kept: dict[str, Collection[Any]]) -> None:
        counts = {name: len(items) for name, items in kept.items()}
        self.progress.report(step, steps, **counts)


def refuse_long_ones(
    what: str, too_long: list[str], key: str, limit: int, longest: int
) -> None:
    """Raise DataError where rows are longer than the recipe's `key` allows."""
    if too_long:
        raise DataError(
            key,
            f"{len(too_long)} {what}, rendered as chats, are longer than "
            f"{limit} tokens:\n  " + "\n  ".join(too_long[:NAMED]),
            f"the longest needs {key} {longest}; or take such {what} out",
        )


def prompt_and_answer(row: Row) -> tuple[str, str]:
    """A row's prompt and answer. Raises BadRow where one is missing or blank."""
    prompt, answer = field(row, "input"), field(row, "output")
    if not prompt.strip():
        raise BadRow("the prompt is empty (column `input`)")
    if not answer.strip():
        raise BadRow("the prompt has no answer (column `output`)")
    return prompt, answer


def prompt_tokens(prompts: list[str], tokenizer: Any) -> list[int]:
    """Tokens of each prompt as a chat that waits for the assistant."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    found = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True
    )
    return [len(ids) for ids in found["input_ids"]]


def split(
    items: list[Item], recipe: PromptsRecipe | PreferencesRecipe
) -> tuple[list[Item], list[Item]]:
    """Train and validation, shuffled; each has an item where there are two for both."""
    items = list(items)
    random.Random(recipe.seed).shuffle(items)
    held = round(len(items) * recipe.validation_fraction)
    if recipe.validation_fraction and len(items) > 1:
        held = min(max(held, 1), len(items) - 1)
    return items[held:], items[:held]


def write_lines(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """A JSON line for each row, under the file's name only once it is whole."""
    import orjson

    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    temporary.replace(path)


if __name__ == "__main__":
    cli.run(main)
