r"""Tokenize documents into Megatron bin/idx shards and a weighted blend.

Reads   --tokenizer  Hugging Face tokenizer folder
        --data       NAME=PATH, repeated: rows with `text`
        --recipe     YAML of one `tokenize:` node
        --earlier    folder, repeated: an --out of before, whole or not. What it has of
                     a chunk that is unchanged is copied; the bytes are as without it
        --share      2/8: make but the second of eight parts of the chunks, about alike
                     in bytes, without those that --earlier has; no blend. All shares
                     as --earlier of a run without it leave that to copy alone
Writes  --out        NAME.bin, NAME.idx  tokens: uint16, or int32 for large
                                         vocabularies; one sequence a document
                     blend.json          sources (name, prefix, weight, documents,
                                         tokens, bad_rows), tokenizer_vocab_size,
                                         eod_id
                     receipts.json       of each source: the settings its tokens depend
                                         on; of each file, or `chunk` of a file that is
                                         cut, counted from 0: SHA-256 of its bytes,
                                         documents, tokens, bytes written and their
                                         digest, the library that encoded it and, where
                                         it is not fastokens, why; documents checked, by
                                         the run that encoded it
Raises  DataError for bad rows, for no token at all, for a folder that is no
        tokenizer's, for special tokens in documents where they are refused
Resumes chunk by chunk: a source whose receipts in --out tell of the same content and
        which is whole is kept, and one half done goes on at the chunk it was at

A chunk is a file, or 16 MB of a plain one of lines or of a parquet file's row groups
(`scripts.data.chunks`). The ids are those of Megatron's preprocess_data.py:
special-token text in a document becomes the special token unless the recipe says
otherwise, what the tokenizer adds by itself (BOS) is kept, and a document without a
token is a document entry with no sequence and no EOD.
fastokens makes them, checked against Hugging Face's tokenizers (`scripts.data.fast`),
which encode all chunks of a file where one document of it differs. OMP_NUM_THREADS
processes make chunks, one a core by default; bytes and receipts do not depend on their
number.

    python -m scripts.data.tokenize --tokenizer T --data corpus=corpus.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any

from scripts.data import share
from scripts.data.chunks import (
    FASTOKENS,
    HUGGING_FACE,
    Chunk,
    ChunkEncoder,
    Made,
    Receipt,
    RowNumbers,
    Task,
    chunks_of,
    digest,
    key_of,
    take_digests,
)
from scripts.data.documents import DocumentEncoder
from scripts.data.fast import num_cores, use_threads
from scripts.data.receipts import FINISHED, RECEIPTS, Earlier, Told, journal, sizes
from scripts.data.shard import Shard
from scripts.lib import cli, rows
from scripts.lib.errors import DataError
from scripts.lib.indexed import IndexedReader
from scripts.lib.progress import Progress
from scripts.lib.schema import Source, TokenizeRecipe

BYTES_OF_A_WORKER = 4_000_000
"""Less than this is encoded sooner than another process starts."""
NAMED = 5


def main(argv: list[str] | None = None) -> int:
    """Tokenize every source that is not whole yet, then write the blend."""
    flags = cli.rows_parser(__doc__)
    flags.add_argument("--earlier", action="append", default=[], type=Path)
    flags.add_argument("--share", type=share.parsed, metavar="I/N")
    args = cli.parse(flags, argv)
    recipe = cli.load_recipe(args.recipe, TokenizeRecipe)
    encoder = DocumentEncoder(args.tokenizer, recipe)
    if encoder.refusal:
        say(
            f"fastokens refuses this tokenizer ({encoder.refusal}): Hugging Face's "
            "encodes it all, more slowly"
        )
    settings = settings_of(recipe, args.tokenizer)
    named = rows.named_sources(recipe.sources, cli.named_paths(args.data))
    sources = [SourceChunks.of(*one, settings) for one in named]
    if args.share:
        sources = shared(sources, args.share, args.earlier)
    progress = Progress(args.work)
    blend, receipts = [], {}
    with closing(Encoders(encoder, args.tokenizer, recipe, sources)) as encoders:
        for source in sources:
            state = State(args.out, source)
            if not state.is_whole():
                earlier = [] if args.share else args.earlier
                write(source, encoders, state, earlier, progress)
            if not args.share:
                state.check()
            receipts[source.name] = {"settings": source.settings, "files": state.files}
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
    if not args.share and not any(source["tokens"] for source in blend):
        raise DataError(
            ", ".join(source.name for source in sources),
            "no tokens: every document is empty",
            "is `column` the one that holds the text?",
        )
    write_json(args.out / RECEIPTS, {"sources": receipts})
    for source in sources:
        journal(args.out, source.name).unlink(missing_ok=True)
    if args.share:
        return 0
    write_json(
        args.out / "blend.json",
        {
            "sources": blend,
            "tokenizer_vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
        },
    )
    return 0


def settings_of(recipe: TokenizeRecipe, tokenizer: Path) -> dict[str, Any]:
    """What tokens depend on beside a source."""
    return {
        **recipe.model_dump(),
        **{
            name: digest(tokenizer / name)
            for name in ("tokenizer.json", "tokenizer_config.json")
        },
        "versions": {name: version_of(name) for name in (FASTOKENS, HUGGING_FACE)},
    }


def version_of(package: str) -> str:
    """The version of an installed package, as its folder of metadata is named.

    `importlib.metadata` says the same, and takes a twentieth of a second to start.
    """
    spec = find_spec(package)
    assert spec and spec.origin
    found = [*Path(spec.origin).parents[1].glob(f"{package}-*.dist-info")]
    if len(found) != 1:
        from importlib.metadata import version

        return version(package)
    return found[0].stem.partition("-")[2]


def settings_with(source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """What the tokens of a source depend on."""
    of_source = source.model_dump(include={"column", "hf", "split", "revision"})
    return settings | of_source


@dataclass(frozen=True)
class SourceChunks:
    """A source, and the chunks it is made in, in reading order."""

    name: str
    source: Source
    settings: dict[str, Any]
    chunks: list[Chunk]

    @classmethod
    def of(
        cls, name: str, source: Source, paths: list[Path], settings: dict[str, Any]
    ) -> SourceChunks:
        files = rows.files_of(name, source, paths)
        chunks = chunks_of(source, paths, files)
        return cls(name, source, settings_with(source, settings), chunks)

    def earlier(self, folders: list[Path]) -> list[Earlier]:
        """What these folders have of the source."""
        return [Earlier(folder, self.name, self.settings) for folder in folders]

    def known_to(self, ones: list[Earlier]) -> dict[int, Earlier]:
        """The first of them that has a chunk as it is now, by the chunk's index."""
        told = [
            i for i, c in enumerate(self.chunks) if any(one.names(c) for one in ones)
        ]
        take_digests([self.chunks[i] for i in told])
        having = {i: [one for one in ones if one.has(self.chunks[i])] for i in told}
        return {i: ones[0] for i, ones in having.items() if ones}

    @cached_property
    def firsts(self) -> list[int]:
        """Of each chunk, the index of the first one of its file."""
        found: list[int] = []
        for i, chunk in enumerate(self.chunks):
            same = i > 0 and chunk.follows(self.chunks[i - 1])
            found.append(found[-1] if same else i)
        return found


def shared(
    sources: list[SourceChunks], number: tuple[int, int], folders: list[Path]
) -> list[SourceChunks]:
    """What one of several jobs has to do. It reads no other job's chunks."""
    earlier = [source.earlier(folders) for source in sources]
    every = [(i, chunk) for i, source in enumerate(sources) for chunk in source.chunks]
    mine = share.share_of(
        [chunk.num_bytes for _, chunk in every],
        [any(one.names(chunk) for one in earlier[i]) for i, chunk in every],
        number,
    )
    found, todo = [], 0
    for i, source in enumerate(sources):
        part = replace(source, chunks=[every[j][1] for j in mine if every[j][0] == i])
        known = part.known_to(earlier[i])
        left = [chunk for j, chunk in enumerate(part.chunks) if j not in known]
        todo += len(left)
        found.append(replace(source, chunks=left))
    say(f"share {number[0]} of {number[1]}: {todo} of {len(mine)} chunks are new")
    return [source for source in found if source.chunks]


class Encoders:
    """What makes chunks: this process, or one a core that the node has, where it pays.

    They start as they are needed.
    """

    def __init__(
        self,
        encoder: DocumentEncoder,
        tokenizer: Path,
        recipe: TokenizeRecipe,
        sources: list[SourceChunks],
    ) -> None:
        self.encoder, self._args = encoder, (encoder, tokenizer, recipe)
        chunks = [chunk for source in sources for chunk in source.chunks]
        num_bytes = sum(chunk.num_bytes for chunk in chunks)
        self.num = min(num_cores(), len(chunks), num_bytes // BYTES_OF_A_WORKER)
        self._workers: Any = None
        self._here = ChunkEncoder(encoder)
        use_threads(1)  # the cores are the processes'

    def make(self, tasks: list[Task], shard: Shard) -> Generator[Made]:
        """What came of each task, in order; its tokens are in the shard."""
        if self.num < 2:
            for task in tasks:
                yield self._here.make(task, shard)
            return
        if not tasks:
            return
        if self._workers is None:
            from scripts.data.workers import Workers

            self._workers = Workers(*self._args, self.num)
        for made in self._workers.make(tasks, apart(shard)):
            if made.receipt:
                shard.append(
                    made.tokens, made.receipt["documents"], made.receipt["tokens"]
                )
            yield made

    def close(self) -> None:
        """End what was started."""
        if self._workers:
            self._workers.close()


def apart(shard: Shard) -> Path:
    """Where chunks wait for those before them."""
    return shard.prefix.with_name(f"{shard.prefix.name}.chunks.tmp")


class State:
    """Receipts of a source's chunks that are done, for a later run to go on from.

    A line each in a file: first the settings, after a whole source FINISHED.
    """

    def __init__(self, folder: Path, source: SourceChunks) -> None:
        self.folder, self.source = folder, source
        self.path = journal(folder, source.name)
        self.files: list[Receipt] = []
        self.documents = self.tokens = self.bad_rows = 0
        told = Told.of(folder, source.name)
        self.finished = told.finished
        chunks = source.chunks[: len(told.files)]
        if told.settings == source.settings and len(told.files) == len(chunks):
            take_digests(chunks)
            if all(
                key_of(receipt) == key_of(chunk.receipt)
                for receipt, chunk in zip(told.files, chunks, strict=True)
            ):
                self._count(told.files)

    def _count(self, receipts: list[Receipt]) -> None:
        self.files += receipts
        self.documents += sum(receipt["documents"] for receipt in receipts)
        self.tokens += sum(receipt["tokens"] for receipt in receipts)
        self.bad_rows += sum(receipt["bad_rows"] for receipt in receipts)

    @property
    def too_bad(self) -> bool:
        """Whether more rows are bad than are allowed."""
        return self.bad_rows > self.source.source.max_bad_rows

    def is_whole(self) -> bool:
        """Whether an earlier run finished bin and idx, and they are undamaged."""
        done = self.finished and len(self.files) == len(self.source.chunks)
        if not done or self.too_bad:
            return False
        try:
            reader = IndexedReader(self.folder / self.source.name)
        except DataError:
            return False
        return len(reader.tokens) == self.tokens

    def check(self) -> None:
        """Raise DataError for a source, or a file that was cut, without a row."""
        if not self.documents:
            raise DataError(f"dataset `{self.source.name}`", "holds no usable row")
        some = {
            receipt["file"]
            for receipt in self.files
            if receipt["documents"] or receipt["bad_rows"]
        }
        for chunk in self.source.chunks:
            if chunk.number and chunk.file not in some:
                raise rows.no_rows(chunk.paths[0])

    def begin(self, shard: Shard) -> None:
        """Write the file anew, with the chunks done that the shard holds, if any."""
        holds = shard.holds(self.documents, self.tokens)
        if self.finished or self.too_bad or not holds:
            self.go_back(0)
        self.finished = False
        self._write()

    def go_back(self, num_chunks: int) -> None:
        """Forget chunks after the first ones."""
        kept = self.files[:num_chunks]
        self.files, self.documents, self.tokens, self.bad_rows = [], 0, 0, 0
        self._count(kept)
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        lines = [self.source.settings, *self.files]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.path)

    def add(self, receipt: Receipt) -> None:
        """Record one more chunk."""
        self._append(receipt)
        self._count([receipt])

    def finish(self) -> None:
        """Record that bin and idx have their names."""
        self._append(FINISHED)
        self.finished = True

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Ways:
    """Chunks that are copied, and why some files are left to Hugging Face's tokenizer.

    A file that was cut is, as any, made in one way: by `because` its first chunk is
    meant.
    """

    source: SourceChunks
    earlier: dict[int, Earlier]
    because: dict[int, str]
    usual: str = ""

    @classmethod
    def of(
        cls, source: SourceChunks, folders: list[Path], state: State, refused: bool
    ) -> Ways:
        known = source.known_to(source.earlier(folders))
        found = cls(source, known, {}, "refused" if refused else "")
        told = {i: one.receipt(source.chunks[i]) for i, one in known.items()}
        told |= enumerate(state.files)
        of_files: dict[int, list[int]] = {}
        for i, first in enumerate(source.firsts):
            of_files.setdefault(first, []).append(i)
        for first, file in of_files.items():
            ways = {told[i].get("because", "") for i in file if i in told}
            if ways <= {found.usual}:
                continue
            if len(ways) > 1 or not told.keys() >= {*file}:
                found.forget(first)
            if first < len(state.files) or first in known:
                found.because[first] = told[first].get("because", "")
        return found

    def forget(self, first: int) -> None:
        """Copy nothing of a file."""
        for i in [i for i in self.earlier if self.source.firsts[i] == first]:
            del self.earlier[i]

    def why(self, index: int) -> str:
        """Why a chunk is not encoded by fastokens, if it is not."""
        return self.because.get(self.source.firsts[index], self.usual)


def write(
    source: SourceChunks,
    encoders: Encoders,
    state: State,
    folders: list[Path],
    progress: Progress,
) -> None:
    """One source's bin and idx, from the chunk where an earlier run stopped."""
    encoder = encoders.encoder
    lengths = sizes(state.folder, source.name)
    shard = Shard(state.folder / source.name, lengths, encoder.vocab_size)
    try:
        state.begin(shard)
        ways = Ways.of(source, folders, state, bool(encoder.refusal))
        shard.go_back(state.documents, state.tokens)
        while len(state.files) < len(source.chunks):
            write_chunks(source, encoders, state, shard, ways, progress)
            shard.go_back(state.documents, state.tokens)
        shard.finish()
    finally:
        shard.close()
        rmtree(apart(shard), ignore_errors=True)
    state.finish()
    if ways.earlier:
        num, total = len(ways.earlier), len(source.chunks)
        say(f"{source.name}: {num} of {total} chunks as before, their tokens copied")


def write_chunks(
    source: SourceChunks,
    encoders: Encoders,
    state: State,
    shard: Shard,
    ways: Ways,
    progress: Progress,
) -> None:
    """Write chunks until all are done, or some have to be done in another way."""
    first = len(state.files)
    todo = range(first, len(source.chunks))
    tasks = [
        Task(source.name, source.source, source.chunks[i], ways.why(i))
        for i in todo
        if i not in ways.earlier
    ]
    numbers = RowNumbers()
    total = max(1, sum(chunk.num_bytes for chunk in source.chunks))
    step = sum(chunk.num_bytes for chunk in source.chunks[:first])
    with closing(encoders.make(tasks, shard)) as all_made:
        for i in todo:
            chunk = source.chunks[i]
            if earlier := ways.earlier.get(i):
                receipt = earlier.receipt(chunk)
                too_bad = state.bad_rows + receipt["bad_rows"]
                if too_bad > source.source.max_bad_rows:
                    del ways.earlier[i]  # so that the rows are named
                    return
                if not earlier.copy(receipt, shard):
                    del ways.earlier[i]
                    say(f"{chunk.file}: {DAMAGED}")
                    return
            else:
                made = next(all_made)
                if made.fault:
                    state.go_back(source.firsts[i])
                    ways.because[source.firsts[i]] = made.fault
                    ways.forget(source.firsts[i])
                    say(f"{chunk.file}: {made.fault}; {ANSWER}")
                    return
                tell(source, state, chunk, made, numbers)
                receipt = made.receipt
            shard.flush()
            state.add(receipt)
            step += chunk.num_bytes
            done = len(state.files) == len(source.chunks)
            progress.report(
                total if done else step,
                total if done else max(total, step) + 1,
                documents=shard.num_documents,
                tokens=shard.num_tokens,
            )


DAMAGED = "its tokens of before are damaged; it is encoded again"
ANSWER = "Hugging Face's tokenizer encodes the whole file"


def tell(
    source: SourceChunks, state: State, chunk: Chunk, made: Made, numbers: RowNumbers
) -> None:
    """Say which rows were left out. Raises DataError for too many, or refused ones."""
    allowed = source.source.max_bad_rows - state.bad_rows
    if not made.bad and not made.refused:
        return
    before = numbers.before(chunk)

    def where(number: int) -> str:
        return rows.place_of(made.place, before + number if number else 0)

    bad = [f"{where(number)}: {what}" for number, what in made.bad]
    for what in bad[:allowed]:
        rows.tell_bad_row(what)
    if len(bad) > allowed:
        raise rows.too_many_bad_rows(source.name, source.source, bad)
    if made.refused:
        found = [f"{where(number)}: {token}" for number, token in made.refused[:NAMED]]
        raise DataError(
            f"dataset `{source.name}`",
            "documents hold the text of special tokens:\n  " + "\n  ".join(found),
            "take it out; or `special_tokens: escape` encodes it as ordinary text, "
            "`keep` as the special token",
        )


def say(what: str) -> None:
    """Tell what a reader of the log should know."""
    print(what, file=sys.stderr, flush=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the name is there only once the file is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    cli.run(main, at_once=True)
