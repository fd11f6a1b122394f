r"""Tokenize documents into Megatron bin/idx shards and a weighted blend.

Reads   --tokenizer  Hugging Face tokenizer folder
        --data       NAME=PATH, repeated: rows with `text`
        --recipe     YAML of one `tokenize:` node
        --earlier    folder, repeated: an --out of before, whole or not. What it has of
                     a file that is unchanged is copied; the bytes are as without it
        --share      2/8: make but the second of eight parts of the files, about alike
                     in bytes, without those that --earlier has; no blend. All shares
                     as --earlier of a run without it leave that to copy alone
Writes  --out        NAME.bin, NAME.idx  tokens: uint16, or int32 for large
                                         vocabularies; one sequence a document
                     blend.json          sources (name, prefix, weight, documents,
                                         tokens, bad_rows), tokenizer_vocab_size,
                                         eod_id
                     receipts.json       of each source: the settings its tokens depend
                                         on; of each file: digest, documents, tokens,
                                         bytes written and their digest, the library
                                         that encoded it, documents checked
Raises  DataError for bad rows, for no token at all, for a folder that is no
        tokenizer's, for special tokens in documents where they are refused
Resumes file by file: a source whose receipts in --out tell of the same files and
        which is whole is kept, and one half done goes on at the file it was at

The ids are those of Megatron's preprocess_data.py: special-token text in a document
becomes the special token unless the recipe says otherwise, what the tokenizer adds by
itself (BOS) is kept, and a document without a token is a document entry with no
sequence and no EOD. fastokens makes them, checked against Hugging Face's tokenizers
(`scripts.data.fast`), which encode a whole file where one document differs.
OMP_NUM_THREADS processes encode, one a core by default; the bytes do not depend on
their number.

    python -m scripts.data.tokenize --tokenizer T --data corpus=corpus.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

from scripts.data.documents import DocumentEncoder, Encoded, Workers
from scripts.data.fast import Checks, Part, num_cores
from scripts.data.receipts import (
    FINISHED,
    RECEIPTS,
    Earlier,
    Receipt,
    Told,
    journal,
    same_file,
    sizes,
)
from scripts.data.shard import Shard
from scripts.data.share import Named, parsed, share_of
from scripts.lib import cli, rows
from scripts.lib.errors import DataError
from scripts.lib.indexed import IndexedReader
from scripts.lib.progress import Progress
from scripts.lib.schema import Source, TokenizeRecipe

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1_000_000
BYTES_OF_A_WORKER = 4_000_000
"""Less than this is encoded sooner than another process starts."""
NAMED = 5
FASTOKENS, HUGGING_FACE = "fastokens", "tokenizers"


def main(argv: list[str] | None = None) -> int:
    """Tokenize every source that is not whole yet, then write the blend."""
    flags = cli.rows_parser(__doc__)
    flags.add_argument("--earlier", action="append", default=[], type=Path)
    flags.add_argument("--share", type=parsed, metavar="I/N")
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
    if args.share:
        sources = shared(named, args.share, settings, args.earlier)
    else:
        sources = [SourceFiles.of(*one, settings) for one in named]
    progress = Progress(args.work)
    blend, receipts = [], {}
    with Workers(encoder, args.tokenizer, recipe, num_workers(sources)) as workers:
        for source in sources:
            state = State(args.out, source)
            if not state.is_whole():
                earlier = [] if args.share else args.earlier
                write(source, workers, state, earlier, progress)
            if not state.documents and not args.share:
                raise DataError(f"dataset `{source.name}`", "holds no usable row")
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
        "versions": {name: version(name) for name in (FASTOKENS, HUGGING_FACE)},
    }


def settings_with(source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """What the tokens of a source depend on."""
    of_source = source.model_dump(include={"column", "hf", "split", "revision"})
    return settings | of_source


class Content:
    """What a unit holds, by its name and digest.

    The digest is taken where it is asked for, or by a thread from `begin` on, while
    others encode.
    """

    def __init__(self, name: str, take: Callable[[], str]) -> None:
        self.name, self.take = name, take
        self._digest: Future[str] | None = None

    def begin(self) -> None:
        """Have the digest by the time that it is asked for."""
        if self._digest is None:
            self._digest = Future()
            Thread(target=self._fulfil, args=(self._digest,), daemon=True).start()

    def _fulfil(self, digest: Future[str]) -> None:
        try:
            digest.set_result(self.take())
        except BaseException as error:  # for the one who asks
            digest.set_exception(error)

    @property
    def receipt(self) -> Receipt:
        """What is known of the unit before it is read."""
        if self._digest is None:
            self._digest = Future()
            self._fulfil(self._digest)
        return {"file": self.name, "digest": self._digest.result()}

    def known_to(self, earlier: Earlier) -> Receipt | None:
        """The receipt that an earlier folder has of the same content, if it does."""
        return earlier.find(self.receipt) if self.name in earlier.names else None


@dataclass(frozen=True)
class SourceFiles:
    """A source, and the units it is read in: one a file, or a whole hub dataset."""

    name: str
    source: Source
    files: list[Path]
    units: list[list[Path]]
    settings: dict[str, Any]
    contents: list[Content]

    @classmethod
    def of(
        cls, name: str, source: Source, paths: list[Path], settings: dict[str, Any]
    ) -> SourceFiles:
        files = rows.files_of(name, source, paths)
        settings = settings_with(source, settings)
        contents = [Content(path.name, partial(digest, path)) for path in files]
        if not source.hf:
            units = [[path] for path in files]
            return cls(name, source, files, units, settings, contents)

        def of_all() -> str:
            if source.revision:
                return source.revision
            found = json.dumps([one.receipt for one in contents])
            return hashlib.blake2b(found.encode()).hexdigest()

        whole = [Content(source.hf, of_all)]
        return cls(name, source, files, [paths], settings, whole)

    def without(self, earlier: list[Earlier]) -> SourceFiles:
        """The same without the units that were done before."""
        left = [
            (unit, content)
            for unit, content in zip(self.units, self.contents, strict=True)
            if not any(content.known_to(one) for one in earlier)
        ]
        units, contents = [u for u, _ in left], [c for _, c in left]
        files = [path for unit in units for path in unit]
        if self.source.hf and units:
            files = self.files
        return replace(self, files=files, units=units, contents=contents)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def shared(
    named: list[Named],
    share: tuple[int, int],
    settings: dict[str, Any],
    folders: list[Path],
) -> list[SourceFiles]:
    """What one of several jobs has to do. It reads no other job's files."""
    earlier = {
        name: [Earlier(f, name, settings_with(source, settings)) for f in folders]
        for name, source, _paths in named
    }
    known = {
        (name, file) for name, ones in earlier.items() for e in ones for file in e.names
    }
    mine = [SourceFiles.of(*one, settings) for one in share_of(named, share, known)]
    left = [source.without(earlier[source.name]) for source in mine]
    todo, total = (sum(len(one.units) for one in ones) for ones in (left, mine))
    say(f"share {share[0]} of {share[1]}: {todo} of {total} files are new")
    return [source for source in left if source.units]


def num_workers(sources: list[SourceFiles]) -> int:
    """Processes that encode: one a core that the node has, fewer for little data."""
    cores = num_cores()
    if any(source.source.hf and not source.files for source in sources):
        return cores
    num_bytes = sum(source.num_bytes for source in sources)
    return max(1, min(cores, num_bytes // BYTES_OF_A_WORKER))


class State:
    """Receipts of a source's units that are done, for a later run to go on from.

    A line each in a file: first the settings, after a whole source FINISHED.
    """

    def __init__(self, folder: Path, source: SourceFiles) -> None:
        self.folder, self.source = folder, source
        self.path = journal(folder, source.name)
        self.files: list[Receipt] = []
        self.documents = self.tokens = self.bad_rows = 0
        told = Told.of(folder, source.name)
        self.finished = told.finished
        if (
            told.settings == source.settings
            and len(told.files) <= len(source.contents)
            and all(map(same_file, told.files, (c.receipt for c in source.contents)))
        ):
            self._count(told.files)

    def _count(self, receipts: list[Receipt]) -> None:
        self.files += receipts
        self.documents += sum(receipt["documents"] for receipt in receipts)
        self.tokens += sum(receipt["tokens"] for receipt in receipts)
        self.bad_rows += sum(receipt["bad_rows"] for receipt in receipts)

    def is_whole(self) -> bool:
        """Whether an earlier run finished bin and idx, and they are undamaged."""
        done = self.finished and len(self.files) == len(self.source.contents)
        if not done or self.bad_rows > self.source.source.max_bad_rows:
            return False
        try:
            reader = IndexedReader(self.folder / self.source.name)
        except DataError:
            return False
        return len(reader.tokens) == self.tokens

    def begin(self, shard: Shard) -> None:
        """Write the file anew, with the units done that the shard holds, if any."""
        too_many = self.bad_rows > self.source.source.max_bad_rows
        holds = shard.holds(self.documents, self.tokens)
        if self.finished or too_many or not holds:
            self.files.clear()
            self.documents = self.tokens = self.bad_rows = 0
        self.finished = False
        temporary = self.path.with_name(self.path.name + ".tmp")
        lines = [self.source.settings, *self.files]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.path)

    def add(self, receipt: Receipt) -> None:
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


@dataclass
class Batch:
    """Where a batch is from; the last one of a unit tells of its bad rows."""

    unit: int
    bytes_read: int
    num_checked: int = 0
    bad_rows: int | None = None
    wheres: list[str] = field(default_factory=list)
    earlier: Earlier | None = None


@dataclass(frozen=True)
class Ways:
    """Units that are copied, and why some are left to Hugging Face's tokenizer."""

    earlier: dict[int, Earlier]
    because: dict[int, str]

    @classmethod
    def of(cls, source: SourceFiles, folders: list[Path], refused: bool) -> Ways:
        units = range(len(source.units))
        found: dict[int, Earlier] = {}
        for folder in folders:
            earlier = Earlier(folder, source.name, source.settings)
            here = [u for u in units if source.contents[u].known_to(earlier)]
            found = dict.fromkeys(here, earlier) | found
        return cls(found, dict.fromkeys(units, "refused") if refused else {})


def write(
    source: SourceFiles,
    workers: Workers,
    state: State,
    folders: list[Path],
    progress: Progress,
) -> None:
    """One source's bin and idx, from the unit where an earlier run stopped."""
    encoder = workers.encoder
    ways = Ways.of(source, folders, bool(encoder.refusal))
    lengths = sizes(state.folder, source.name)
    shard = Shard(state.folder / source.name, lengths, encoder.vocab_size)
    try:
        state.begin(shard)
        while len(state.files) < len(source.units):
            shard.go_back(state.documents, state.tokens)
            if fault := write_units(source, workers, state, shard, ways, progress):
                unit = len(state.files)
                if ways.earlier.pop(unit, None):
                    answer = "it is encoded again"
                else:
                    ways.because[unit] = fault
                    answer = "Hugging Face's tokenizer encodes the whole file"
                say(f"{source.contents[unit].name}: {fault}; {answer}")
        shard.finish()
    finally:
        shard.close()
    state.finish()
    if ways.earlier:
        num, total = len(ways.earlier), len(source.units)
        say(f"{source.name}: {num} of {total} files as before, their tokens copied")


def write_units(
    source: SourceFiles,
    workers: Workers,
    state: State,
    shard: Shard,
    ways: Ways,
    progress: Progress,
) -> str:
    """Write units until all are done or one's ids are wrong; tell what was wrong."""
    num_checked, total = 0, max(1, source.num_bytes)
    for batch, encoded in workers.encode(batches(source, state, ways)):
        content = source.contents[batch.unit]
        if encoded.fault:
            return encoded.fault
        if encoded.refused:
            raise refusal(source, batch, encoded)
        if batch.earlier and not batch.earlier.copy(content.receipt, shard):
            return "its tokens of before are damaged"
        shard.add(encoded.ids, encoded.lengths)
        num_checked += batch.num_checked
        if batch.earlier:
            shard.flush()
            state.add(batch.earlier.find(content.receipt) or content.receipt)
        elif batch.bad_rows is not None:
            shard.flush()
            because = ways.because.get(batch.unit)
            tokens = shard.num_tokens - state.tokens
            state.add(
                {
                    **content.receipt,
                    "documents": shard.num_documents - state.documents,
                    "tokens": tokens,
                    "bytes": tokens * shard.dtype.itemsize,
                    "content": shard.take_digest(),
                    "bad_rows": batch.bad_rows,
                    "encoder": HUGGING_FACE if because else FASTOKENS,
                    "checked": num_checked,
                    **({"because": because} if because else {}),
                }
            )
            num_checked = 0
        done = len(state.files) == len(source.units)
        progress.report(
            total if done else batch.bytes_read,
            total if done else max(total, batch.bytes_read) + 1,
            documents=shard.num_documents,
            tokens=shard.num_tokens,
        )
    return ""


def refusal(source: SourceFiles, batch: Batch, encoded: Encoded) -> DataError:
    """The error that tells of special tokens in documents."""
    found = [f"{batch.wheres[i]}: {token}" for i, token in encoded.refused[:NAMED]]
    return DataError(
        f"dataset `{source.name}`",
        "documents hold the text of special tokens:\n  " + "\n  ".join(found),
        "take it out; or `special_tokens: escape` encodes it as ordinary text, `keep` "
        "as the special token",
    )


def batches(
    source: SourceFiles, state: State, ways: Ways
) -> Iterator[tuple[Batch, list[str], list[Part] | None]]:
    """Texts of the units to be done, in order, and which of them are encoded twice."""
    num_bad = state.bad_rows
    column = source.source.column or "text"
    first = len(state.files)
    bytes_before = sum(path.stat().st_size for (path,) in source.units[:first])

    for unit, paths in enumerate(source.units[first:], first):
        earlier = ways.earlier.get(unit)
        content = source.contents[unit]
        receipt = earlier and earlier.find(content.receipt)
        if receipt and num_bad + receipt["bad_rows"] <= source.source.max_bad_rows:
            num_bad += receipt["bad_rows"]
            bytes_before += sum(path.stat().st_size for path in paths)
            yield Batch(unit, bytes_before, earlier=earlier), [], None
            continue
        reader = rows.read_rows(
            source.name, source.source, paths, lambda row: rows.field(row, column)
        )
        reader.num_bad = num_bad
        reader.num_rows = 1  # that none is usable is an error of a whole source only
        checks = None if unit in ways.because else Checks()
        for group in groups(reader):
            texts = [text for text, _where in group]
            batch = Batch(unit, bytes_before + reader.bytes_read)
            batch.wheres = [where for _text, where in group]
            check = checks.choose(texts) if checks else None
            batch.num_checked = len({i for i, _part in check or ()})
            yield batch, texts, check
            content.begin()  # not before the workers are there: they are forked
        read = bytes_before + reader.bytes_read
        yield Batch(unit, read, bad_rows=reader.num_bad - num_bad), [], None
        num_bad = reader.num_bad
        bytes_before += reader.bytes_total


def groups(
    texts: Iterable[tuple[str, str]],
) -> Iterator[list[tuple[str, str]]]:
    """Texts in groups small enough to hold and large enough to keep cores busy."""
    group: list[tuple[str, str]] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text[0])
        if len(group) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def digest(path: Path) -> str:
    """A file's content as a hexadecimal digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def say(what: str) -> None:
    """Tell what a reader of the log should know."""
    print(what, file=sys.stderr, flush=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the name is there only once the file is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    cli.run(main)
