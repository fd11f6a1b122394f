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
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.progress import Progress
from scripts.lib.rows import BadRow, Row, field, named_sources, read_rows
from scripts.lib.schema import PromptsRecipe

BATCH_PROMPTS = 512
NAMED = 5


def main(argv: list[str] | None = None) -> int:
    """Read, measure, split and write."""
    args = cli.parse_rows(__doc__, argv)
    recipe = cli.load_recipe(args.recipe, PromptsRecipe)
    tokenizer = load_tokenizer(args.tokenizer)
    answers, counts = read(recipe, args, tokenizer)
    train, validation = split(answers, recipe)
    write_lines(train, args.out / "train.jsonl")
    write_lines(validation, args.out / "validation.jsonl")
    counts = {"train": len(train), "validation": len(validation), **counts}
    (args.out / "prompts.json").write_text(json.dumps(counts, indent=2) + "\n")
    return 0


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, which must have a chat template."""
    from transformers import AutoTokenizer

    try:
        result = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise DataError(
            str(folder), f"cannot be loaded as a tokenizer: {error}"
        ) from error
    if result.chat_template is None:
        raise DataError(
            str(folder),
            "the tokenizer has no chat template",
            "give the tokenizer node a `chat_template`",
        )
    return result


def read(
    recipe: PromptsRecipe, args: argparse.Namespace, tokenizer: Any
) -> tuple[dict[str, str], dict[str, int]]:
    """Answers by prompt, in reading order, and what was met on the way."""
    answers: dict[str, str] = {}
    too_long: list[str] = []
    progress = Progress(args.work)
    duplicates = conflicting = num_bad = longest = done = 0
    for name, source, paths in named_sources(
        recipe.sources, cli.named_paths(args.data)
    ):
        if source.column is not None:
            raise RecipeError(
                f"data.{name}.column", "prompts read the columns `input` and `output`"
            )
        rows = read_rows(name, source, paths, prompt_and_answer)
        pairs = iter(rows)
        while batch := list(islice(pairs, BATCH_PROMPTS)):
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
            progress.report(
                done + rows.bytes_read,
                done + max(rows.bytes_total, rows.bytes_read) + 1,
                prompts=len(answers),
            )
        num_bad += rows.num_bad
        done += rows.bytes_total
    progress.report(max(1, done), max(1, done), prompts=len(answers))
    if too_long:
        raise DataError(
            "max_prompt_tokens",
            f"{len(too_long)} prompts, rendered as chats, are longer than "
            f"{recipe.max_prompt_tokens} tokens:\n  " + "\n  ".join(too_long[:NAMED]),
            f"the longest needs max_prompt_tokens {longest}; or take such prompts out",
        )
    return answers, {
        "duplicates": duplicates,
        "conflicting": conflicting,
        "bad_rows": num_bad,
        "longest_prompt_tokens": longest,
    }


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
    answers: dict[str, str], recipe: PromptsRecipe
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Train and validation, shuffled; each has a row where there are two for both."""
    pairs = list(answers.items())
    random.Random(recipe.seed).shuffle(pairs)
    held = round(len(pairs) * recipe.validation_fraction)
    if recipe.validation_fraction and len(pairs) > 1:
        held = min(max(held, 1), len(pairs) - 1)
    return pairs[held:], pairs[:held]


def write_lines(pairs: list[tuple[str, str]], path: Path) -> None:
    """A JSON line for each pair, under the file's name only once it is whole."""
    import orjson

    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for prompt, answer in pairs:
            row = {"input": prompt, "output": answer}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    temporary.replace(path)


if __name__ == "__main__":
    cli.run(main)
