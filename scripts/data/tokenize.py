r"""Tokenize documents into Megatron bin/idx shards and a weighted blend.

Reads   --tokenizer  Hugging Face tokenizer folder
        --data       NAME=PATH, repeated: rows with `text`
        --recipe     YAML of one `tokenize:` node
Writes  --out        NAME.bin, NAME.idx  tokens: uint16, or int32 for large
                                         vocabularies; one sequence a document
                     blend.json          sources (name, prefix, weight, documents,
                                         tokens, bad_rows), tokenizer_vocab_size,
                                         eod_id
Raises  DataError for bad rows, for no token at all, for a folder that is no
        tokenizer's
Resumes source by source: one whose receipt in --work tells of the same bytes in
        and whose files are whole is kept

The ids are those of Megatron's preprocess_data.py: special-token text in a document
becomes the special token, what the tokenizer adds by itself (BOS) is kept, and a
document without a token is a document entry with no sequence and no EOD.

    python -m scripts.data.tokenize --tokenizer T --data corpus=corpus.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import DataError
from scripts.lib.indexed import IndexedReader, IndexedWriter
from scripts.lib.progress import Progress
from scripts.lib.rows import RowReader, field, files_of, named_sources, read_rows
from scripts.lib.schema import Source, TokenizeRecipe

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4_000_000


class Encoder:
    """The tokenizer, behind the one call that a faster library would replace."""

    def __init__(self, folder: Path) -> None:
        import tokenizers

        config = folder / "tokenizer_config.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(
                str(folder / "tokenizer.json")
            )
            eos = json.loads(config.read_text())["eos_token"]
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(
                str(folder),
                f"not a tokenizer's folder: {type(error).__name__}: {error}",
                "tokenizer.json, and tokenizer_config.json with `eos_token`, are "
                "needed; the tokenizer stage writes both",
            ) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eod_id = self.tokenizer.token_to_id(
            eos["content"] if isinstance(eos, dict) else str(eos)
        )
        if self.eod_id is None:
            raise DataError(str(config), f"eos_token {eos} is not in the vocabulary")
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, as the tokenizer itself gives them."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(texts)]


def main(argv: list[str] | None = None) -> int:
    """Tokenize every source that is not whole yet, then write the blend."""
    args = cli.parse_rows(__doc__, argv)
    recipe = cli.load_recipe(args.recipe, TokenizeRecipe)
    sources = named_sources(recipe.sources, cli.named_paths(args.data))
    encoder = Encoder(args.tokenizer)
    progress = Progress(args.work)
    blend = []
    for name, source, paths in sources:
        prefix, receipt = args.out / name, args.work / f"{name}.receipt.json"
        key = key_of(recipe, source, args.tokenizer, files_of(name, source, paths))
        counts = kept(receipt, key, prefix)
        if counts is None:
            rows = read_rows(
                name,
                source,
                paths,
                lambda row, s=source: field(row, s.column or "text"),
            )
            counts = write(rows, encoder, recipe, prefix, progress)
            receipt.write_text(json.dumps({"key": key, "counts": counts}))
        blend.append({"name": name, "prefix": name, "weight": source.weight, **counts})
    if not any(source["tokens"] for source in blend):
        raise DataError(
            ", ".join(name for name, _, _ in sources),
            "no tokens: every document is empty",
            "is `column` the one that holds the text?",
        )
    write_json(
        args.out / "blend.json",
        {
            "sources": blend,
            "tokenizer_vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
        },
    )
    return 0


def write(
    rows: RowReader[str],
    encoder: Encoder,
    recipe: TokenizeRecipe,
    prefix: Path,
    progress: Progress,
) -> dict[str, int]:
    """One source's bin and idx; its counts of documents, tokens and bad rows."""
    writer = IndexedWriter(prefix, encoder.vocab_size)
    for texts in batches(text for text, _where in rows):
        documents = encoder.encode(texts)
        if recipe.append_eod:
            for ids in documents:
                if ids:
                    ids.append(encoder.eod_id)
        writer.add(documents)
        progress.report(
            rows.bytes_read,
            max(rows.bytes_total, rows.bytes_read) + 1,
            documents=writer.num_documents,
            tokens=writer.num_tokens,
        )
    writer.finish()
    done = max(1, rows.bytes_total)
    progress.report(
        done, done, documents=writer.num_documents, tokens=writer.num_tokens
    )
    return {
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
        "bad_rows": rows.num_bad,
    }


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups small enough to hold and large enough to keep cores busy."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def key_of(
    recipe: TokenizeRecipe, source: Source, tokenizer: Path, files: list[Path]
) -> dict[str, Any]:
    """What a source's tokens depend on; its files by content, never by time."""
    return {
        "append_eod": recipe.append_eod,
        "source": source.model_dump(exclude={"weight"}),
        "tokenizer": [
            digest(tokenizer / name)
            for name in ("tokenizer.json", "tokenizer_config.json")
        ],
        "files": [[path.name, digest(path)] for path in files],
    }


def digest(path: Path) -> str:
    """A file's content as a hexadecimal digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def kept(receipt: Path, key: dict[str, Any], prefix: Path) -> dict[str, int] | None:
    """Counts of a source that an earlier run finished from the same bytes."""
    try:
        found = json.loads(receipt.read_text())
        counts, reader = found["counts"], IndexedReader(prefix)
    except (OSError, ValueError, KeyError, DataError):
        return None
    same = found["key"] == key and len(reader.tokens) == counts["tokens"]
    return counts if same else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the name is there only once the file is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    cli.run(main)
