r"""Tokenize documents into Megatron bin/idx shards and a weighted blend.

Reads   --tokenizer  Hugging Face tokenizer folder
        --data       NAME=PATH, repeated: rows with `text`
        --recipe     YAML of one `tokenize:` node
Writes  --out        NAME.bin, NAME.idx  tokens: uint16, or int32 for large
                                         vocabularies; one sequence a document
                     blend.json          sources (name, prefix, weight, documents,
                                         tokens, bad_rows), tokenizer_vocab_size,
                                         eod_id
                     receipts.json       of each file: digest, documents, tokens,
                                         bytes written, the library that encoded it,
                                         documents checked; and the tokenizer's digest
Raises  DataError for bad rows, for no token at all, for a folder that is no
        tokenizer's
Resumes file by file: a source whose receipts in --work tell of the same bytes in and
        whose files are whole is kept, and one half done goes on at the file it was at

The ids are those of Megatron's preprocess_data.py: special-token text in a document
becomes the special token, what the tokenizer adds by itself (BOS) is kept, and a
document without a token is a document entry with no sequence and no EOD. fastokens
makes them, checked against Hugging Face's tokenizers (`scripts.data.fast`), which
encode a whole file where one document differs. OMP_NUM_THREADS processes encode, one a
core by default; the bytes do not depend on their number.

    python -m scripts.data.tokenize --tokenizer T --data corpus=corpus.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.data.fast import FASTOKENS, HUGGING_FACE, Checks, Encoder, Workers
from scripts.data.shard import Shard
from scripts.lib import cli, rows
from scripts.lib.errors import DataError
from scripts.lib.indexed import IndexedReader
from scripts.lib.progress import Progress
from scripts.lib.schema import Source, TokenizeRecipe

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1_000_000
FINISHED = {"finished": True}
BYTES_OF_A_WORKER = 4_000_000
"""Less than this is encoded sooner than another process starts."""


def main(argv: list[str] | None = None) -> int:
    """Tokenize every source that is not whole yet, then write the blend."""
    args = cli.parse_rows(__doc__, argv)
    recipe = cli.load_recipe(args.recipe, TokenizeRecipe)
    sources = [
        SourceFiles.of(name, source, paths)
        for name, source, paths in rows.named_sources(
            recipe.sources, cli.named_paths(args.data)
        )
    ]
    encoder = Encoder(args.tokenizer)
    if encoder.refusal:
        print(
            f"fastokens refuses this tokenizer ({encoder.refusal}): Hugging Face's "
            "encodes it all, more slowly",
            file=sys.stderr,
            flush=True,
        )
    tokenizer = [
        digest(args.tokenizer / name)
        for name in ("tokenizer.json", "tokenizer_config.json")
    ]
    progress = Progress(args.work)
    blend, receipts = [], {}
    with Workers(
        encoder, args.tokenizer, recipe.append_eod, num_workers(sources)
    ) as workers:
        for source in sources:
            key = {
                "append_eod": recipe.append_eod,
                "source": source.source.model_dump(exclude={"weight"}),
                "tokenizer": tokenizer,
                "files": [[path.name, digest(path)] for path in source.files],
            }
            prefix = args.out / source.name
            state = State(args.work / f"{source.name}.receipts.jsonl", key)
            if not state.is_whole(prefix):
                write(source, workers, state, prefix, progress)
            receipts[source.name] = state.files
            blend.append(
                {
                    "name": source.name,
                    "prefix": source.name,
                    "weight": source.source.weight,
                    "documents": state.documents,
                    "tokens": state.tokens,
                    "bad_rows": state.bad_rows,
                }
            )
    if not any(source["tokens"] for source in blend):
        raise DataError(
            ", ".join(source.name for source in sources),
            "no tokens: every document is empty",
            "is `column` the one that holds the text?",
        )
    write_json(
        args.out / "receipts.json",
        {
            "tokenizer.json": tokenizer[0],
            "tokenizer_config.json": tokenizer[1],
            "sources": receipts,
        },
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


@dataclass(frozen=True)
class SourceFiles:
    """A source, and the units it is read in: one a file, or a whole hub dataset."""

    name: str
    source: Source
    files: list[Path]
    units: list[list[Path]]

    @classmethod
    def of(cls, name: str, source: Source, paths: list[Path]) -> SourceFiles:
        files = rows.files_of(name, source, paths)
        units = [paths] if source.hf else [[path] for path in files]
        return cls(name, source, files, units)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def receipt(self, unit: int, key: dict[str, Any]) -> dict[str, Any]:
        """What is known of a unit before it is read."""
        if self.source.hf:
            files = json.dumps(key["files"]).encode()
            content = self.source.revision or hashlib.blake2b(files).hexdigest()
            return {"file": self.source.hf, "digest": content}
        name, content = key["files"][unit]
        return {"file": name, "digest": content}


def num_workers(sources: list[SourceFiles]) -> int:
    """Processes that encode: one a core that the node has, fewer for little data."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    cores = int(wanted) if wanted.isdecimal() else len(os.sched_getaffinity(0))
    if any(source.source.hf and not source.files for source in sources):
        return cores
    num_bytes = sum(source.num_bytes for source in sources)
    return max(1, min(cores, num_bytes // BYTES_OF_A_WORKER))


class State:
    """Receipts of a source's units that are done, a line each, for a later run.

    The first line is what they depend on, the last one of a whole source FINISHED.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.files: list[dict[str, Any]] = []
        self.documents = self.tokens = self.bad_rows = 0
        self.finished = False
        found = read_lines(path)
        if found[:1] == [key]:
            self.finished = found[-1] == FINISHED
            self._count(found[1 : -1 if self.finished else None])

    def _count(self, receipts: list[dict[str, Any]]) -> None:
        self.files += receipts
        self.documents += sum(receipt["documents"] for receipt in receipts)
        self.tokens += sum(receipt["tokens"] for receipt in receipts)
        self.bad_rows += sum(receipt["bad_rows"] for receipt in receipts)

    def is_whole(self, prefix: Path) -> bool:
        """Whether an earlier run finished bin and idx, and they are undamaged."""
        try:
            return self.finished and len(IndexedReader(prefix).tokens) == self.tokens
        except DataError:
            return False

    def begin(self, from_start: bool) -> None:
        """Write the file anew, with the units done so far or, from the start, none."""
        if from_start:
            self.files.clear()
            self.documents = self.tokens = self.bad_rows = 0
        self.finished = False
        temporary = self.path.with_name(self.path.name + ".tmp")
        lines = [self.key, *self.files]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.path)

    def add(self, receipt: dict[str, Any]) -> None:
        """Record one more unit."""
        self._append(receipt)
        self._count([receipt])

    def finish(self) -> None:
        """Record that bin and idx have their names."""
        self._append(FINISHED)
        self.finished = True

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file's JSON lines, as far as they are whole; none where it is missing."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError):
        return []


@dataclass
class Batch:
    """Where a batch is from; the last one of a unit tells of its bad rows."""

    unit: int
    bytes_read: int
    num_checked: int
    bad_rows: int | None = None


def write(
    source: SourceFiles,
    workers: Workers,
    state: State,
    prefix: Path,
    progress: Progress,
) -> None:
    """One source's bin and idx, from the unit where an earlier run stopped."""
    encoder = workers.encoder
    shard = Shard(prefix, state.path.with_suffix(".sizes"), encoder.vocab_size)
    state.begin(state.finished or not shard.holds(state.documents, state.tokens))
    because = (
        dict.fromkeys(range(len(source.units)), "refused") if encoder.refusal else {}
    )
    try:
        while len(state.files) < len(source.units):
            shard.go_back(state.documents, state.tokens)
            if fault := write_units(source, workers, state, shard, because, progress):
                unit = len(state.files)
                because[unit] = fault
                print(
                    f"{source.receipt(unit, state.key)['file']}: {fault}; Hugging "
                    "Face's tokenizer encodes the whole file",
                    file=sys.stderr,
                    flush=True,
                )
        if not state.documents:
            raise DataError(f"dataset `{source.name}`", "holds no usable row")
        shard.finish()
    finally:
        shard.close()
    state.finish()


def write_units(
    source: SourceFiles,
    workers: Workers,
    state: State,
    shard: Shard,
    because: dict[int, str],
    progress: Progress,
) -> str:
    """Write units until all are done or one's ids are wrong; tell what was wrong.

    `because` tells why a unit is left to Hugging Face's tokenizer.
    """
    num_checked, total = 0, max(1, source.num_bytes)
    for batch, encoded in workers.encode(batches(source, state, because)):
        if encoded.fault:
            return encoded.fault
        shard.add(encoded.ids, encoded.lengths)
        num_checked += batch.num_checked
        if batch.bad_rows is not None:
            shard.flush()
            documents = shard.num_documents - state.documents
            tokens = shard.num_tokens - state.tokens
            receipt = {
                **source.receipt(batch.unit, state.key),
                "documents": documents,
                "tokens": tokens,
                "bytes": tokens * shard.dtype.itemsize,
                "bad_rows": batch.bad_rows,
                "encoder": HUGGING_FACE if batch.unit in because else FASTOKENS,
                "checked": num_checked,
            }
            if batch.unit in because:
                receipt["because"] = because[batch.unit]
            state.add(receipt)
            num_checked = 0
        done = len(state.files) == len(source.units)
        progress.report(
            total if done else batch.bytes_read,
            total if done else max(total, batch.bytes_read) + 1,
            documents=shard.num_documents,
            tokens=shard.num_tokens,
        )
    return ""


def batches(
    source: SourceFiles, state: State, because: dict[int, str]
) -> Iterator[tuple[Batch, list[str], list[int] | None]]:
    """Texts of the units to be done, in order, and which of them are encoded twice."""
    checks = Checks()
    num_bad = state.bad_rows
    column = source.source.column or "text"
    first = len(state.files)
    bytes_before = sum(path.stat().st_size for (path,) in source.units[:first])

    def batch(
        unit: int, texts: list[str], bad_rows: int | None
    ) -> tuple[Batch, list[str], list[int] | None]:
        check = None if unit in because else checks.choose(texts)
        bytes_read = bytes_before + reader.bytes_read
        return Batch(unit, bytes_read, len(check or ()), bad_rows), texts, check

    for unit, paths in enumerate(source.units[first:], first):
        reader = rows.read_rows(
            source.name, source.source, paths, lambda row: rows.field(row, column)
        )
        reader.num_bad = num_bad
        reader.num_rows = 1  # that none is usable is an error of a whole source only
        waiting: list[str] = []
        for texts in groups(text for text, _where in reader):
            if waiting:
                yield batch(unit, waiting, None)
            waiting = texts
        yield batch(unit, waiting, reader.num_bad - num_bad)
        num_bad = reader.num_bad
        bytes_before += reader.bytes_total


def groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups small enough to hold and large enough to keep cores busy."""
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def digest(path: Path) -> str:
    """A file's content as a hexadecimal digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the name is there only once the file is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    cli.run(main)
