r"""Train a byte-level BPE tokenizer on data, or take a ready one as it is.

Reads   --data           NAME=PATH, repeated: rows with `text`, or chats with
                         `messages` (their contents), as .jsonl, .parquet, .txt
        --tokenizer      or the folder of a ready one; or `hf` of the recipe
        --chat-template  Jinja file with `{% generation %}`; replaces a ready one's
        --recipe         YAML of one `tokenizer:` node
Writes  --out            Hugging Face tokenizer folder
Raises  RecipeError where the recipe names no tokenizer, or two
        DataError for bad rows, and for a template or tokenizer that won't do
Resumes never: it starts again

A trained one splits digits, has <pad> <eos> <bos> and the roles' tokens as ids 0
to 5, and adds nothing to a text. No code of a ready tokenizer's is run.

    python -m scripts.data.tokenizer --data corpus=corpus.jsonl \
        --chat-template config/models/tiny/chat_template.jinja \
        --recipe R --out work/try
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.progress import Progress
from scripts.lib.rows import BadRow, Row, field, named_sources, read_rows
from scripts.lib.schema import TokenizerRecipe

ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]
SPECIALS = ["<pad>", "<eos>", "<bos>", *ROLES]
BYTES = 256
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
]


def main(argv: list[str] | None = None) -> int:
    """Make the tokenizer's folder."""
    args = parse(argv)
    recipe = cli.load_recipe(args.recipe, TokenizerRecipe)
    template = read_template(args.chat_template) if args.chat_template else None
    ready = [name for name in (args.tokenizer, recipe.hf) if name]
    if len(ready) + (recipe.vocab_size is not None) != 1:
        raise RecipeError(
            str(args.recipe),
            "exactly one of vocab_size, hf and --tokenizer is needed",
            "vocab_size trains a tokenizer on --data; the others take a ready one",
        )
    tokenizer = load_ready(args.tokenizer, recipe) if ready else train(recipe, args)
    if template is not None:
        tokenizer.chat_template = template
    check_template(tokenizer, args.chat_template)
    tokenizer.save_pretrained(args.out)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the stage."""
    flags = cli.parser(__doc__)
    flags.add_argument("--data", action="append", default=[], metavar="NAME=PATH")
    flags.add_argument("--tokenizer", type=Path, help="folder of a ready tokenizer")
    flags.add_argument("--chat-template", type=Path, help="Jinja file")
    return cli.parse(flags, argv)


def read_template(path: Path) -> str:
    """The chat template of a file, which must mark what the assistant says."""
    try:
        result = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"cannot be read: {error}") from error
    if not GENERATION.search(result):
        raise DataError(
            str(path),
            "no `{% generation %}`: SFT would not know the assistant's tokens",
            "put `{% generation %}` and `{% endgeneration %}` around what it says, "
            "its end-of-turn token included",
        )
    return result


def train(recipe: TokenizerRecipe, args: argparse.Namespace) -> Any:
    """A tokenizer trained on the sources' texts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = BYTES + len(SPECIALS)
    assert recipe.vocab_size is not None
    if recipe.vocab_size < smallest:
        raise RecipeError(
            f"{args.recipe} vocab_size",
            f"{recipe.vocab_size} is below {smallest}: every byte and special token",
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(recipe, args), trainer)
    if tokenizer.get_vocab_size() < recipe.vocab_size:
        print(
            f"the data gave {tokenizer.get_vocab_size()} entries, fewer than "
            f"vocab_size {recipe.vocab_size}",
            file=sys.stderr,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        bos_token="<bos>",  # noqa: S106
        extra_special_tokens=ROLES,
        clean_up_tokenization_spaces=False,
    )


def texts(recipe: TokenizerRecipe, args: argparse.Namespace) -> Iterator[str]:
    """Every text of every source, in the recipe's order."""
    progress = Progress(args.work)
    done = 0
    for name, source, paths in named_sources(
        recipe.sources, cli.named_paths(args.data)
    ):
        rows = read_rows(
            name, source, paths, lambda row, c=source.column: row_texts(row, c)
        )
        for number, (found, _where) in enumerate(rows):
            yield from found
            if number % 1000 == 0:
                progress.report(done + rows.bytes_read, done + rows.bytes_total + 1)
        done += rows.bytes_total
    progress.report(max(1, done), max(1, done))


def row_texts(row: Row, column: str | None) -> list[str]:
    """A row's texts: one of a document, each message's of a chat."""
    column = column or ("messages" if "messages" in row else "text")
    if not isinstance(row.get(column), list):
        return [field(row, column)]
    messages = row[column]
    if not all(isinstance(message, dict) for message in messages):
        raise BadRow(f"column `{column}` holds a message that is no object")
    return [field(message, "content") for message in messages]


def load_ready(folder: Path | None, recipe: TokenizerRecipe) -> Any:
    """A ready tokenizer, from a folder or the hub, that can end a document."""
    from transformers import AutoTokenizer

    if folder is None and recipe.revision is None:
        raise RecipeError(
            "revision",
            f"missing: `{recipe.hf}` may change on the hub",
            "name a commit of it, 40 hex digits",
        )
    where = str(folder or recipe.hf)
    if folder is not None and not folder.is_dir():
        raise DataError(where, "no such folder")
    try:
        result = AutoTokenizer.from_pretrained(
            where,
            revision=None if folder else recipe.revision,
            local_files_only=folder is not None,
            trust_remote_code=False,
        )
    except Exception as error:
        raise DataError(
            where,
            f"cannot be loaded as a tokenizer: {type(error).__name__}: {error}",
            "a tokenizer that runs code of its own is not taken",
        ) from error
    if not result.is_fast:
        raise DataError(where, "no fast tokenizer: there is no tokenizer.json")
    if result.eos_token_id is None:
        raise DataError(
            where, "has no eos token", "set `eos_token` in its tokenizer_config.json"
        )
    for loading in ("name_or_path", "is_local", "local_files_only"):
        result.init_kwargs.pop(loading, None)
    return result


def check_template(tokenizer: Any, path: Path | None) -> None:
    """Render a chat, so that a template that cannot be used is found here."""
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template(PROBE, tokenize=False)
    except Exception as error:
        raise DataError(
            str(path or "chat template"),
            f"cannot be rendered: {type(error).__name__}: {error}",
        ) from error


if __name__ == "__main__":
    cli.run(main)
