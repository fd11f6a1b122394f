"""What is read, encoded and told of by itself: a file, lines of a large one, a dataset.

A plain file of lines above CHUNK_BYTES is cut every so many bytes: a chunk has the lines
that begin there. A parquet file's chunks are row groups, as many as have that many bytes
together. Any other file is one chunk, and so is a dataset of the hub. A chunk's tokens
depend on its bytes and the settings alone, so chunks are made in any order, by any
process or job, and the bytes do not depend on which.

What is encoded twice (`scripts.data.fast`) is chosen from a chunk's texts, and for a
later one of a file also from the first one's: code points that those settle are settled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.data.documents import DocumentEncoder
from scripts.data.fast import Checks, num_cores
from scripts.data.shard import Tokens
from scripts.lib import rows
from scripts.lib.schema import Source

CHUNK_BYTES = 16_000_000
"""As one process encodes in a third of a second."""
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1_000_000
FASTOKENS, HUGGING_FACE = "fastokens", "tokenizers"

Receipt = dict[str, Any]
Key = tuple[str, int | None, str]


@dataclass(eq=False)
class Chunk:
    """`file`: its name in receipts; `paths`: what `rows.read_rows` is given.

    Of a file that is cut, `number` counts its chunks from 0, and `between` is where
    its lines begin, or which row groups it has; `head` is that of the first. `files`:
    those of a dataset in a folder; `revision`: of one on the hub.
    """

    file: str
    paths: list[Path]
    num_bytes: int
    number: int | None = None
    between: tuple[int, int] = (0, 0)
    head: tuple[int, int] = (0, 0)
    files: list[Path] = field(default_factory=list)
    revision: str = ""
    _digest: str = ""

    @property
    def first(self) -> Chunk:
        """The first one of a file that is cut."""
        return replace(self, number=0, between=self.head, _digest="")

    @property
    def part(self) -> range | None:
        """The bytes of its lines, or its row groups, where a file is cut."""
        if self.number is None:
            return None
        if rows.is_parquet(self.paths[0]):
            return range(*self.between)
        return rows.lines_from(self.paths[0], *self.between)

    @property
    def digest(self) -> str:
        """Of its bytes, which are read as it is asked for first."""
        if not self._digest:
            self._digest = self._taken()
        return self._digest

    def _taken(self) -> str:
        if self.revision:
            return self.revision
        if not self.files:
            return digest(self.paths[0], self.part)
        found = [{"file": path.name, "digest": digest(path)} for path in self.files]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @property
    def receipt(self) -> Receipt:
        """What is known of it before it is encoded."""
        which = {} if self.number is None else {"chunk": self.number}
        return {"file": self.file, **which, "digest": self.digest}

    def follows(self, other: Chunk) -> bool:
        """Whether both are of one file that was cut, this one later."""
        return self.paths == other.paths and (self.number or 0) > (other.number or 0)


def chunks_of(source: Source, paths: list[Path], files: list[Path]) -> list[Chunk]:
    """A source's chunks, in reading order; `files` as `rows.files_of` has them."""
    if source.hf:
        num_bytes = sum(path.stat().st_size for path in files)
        revision = source.revision or ""
        return [Chunk(source.hf, paths, num_bytes, files=files, revision=revision)]
    found = []
    for path in files:
        size = path.stat().st_size
        if size <= CHUNK_BYTES or not rows.can_be_cut(path):
            found.append(Chunk(path.name, [path], size))
            continue
        for number, (between, num_bytes) in enumerate(parts_of(path, size)):
            head = found[-1].head if number else between
            found.append(Chunk(path.name, [path], num_bytes, number, between, head))
    return found


def parts_of(path: Path, size: int) -> list[tuple[tuple[int, int], int]]:
    """Where a file is cut, and how many bytes a chunk has."""
    if rows.is_parquet(path):
        groups = rows.RowGroups(path)
        return [
            ((part.start, part.stop), len(groups.bytes_of(part)))
            for part in groups.between(CHUNK_BYTES)
        ]
    starts = range(0, size, CHUNK_BYTES)
    return [((i, i + CHUNK_BYTES), min(CHUNK_BYTES, size - i)) for i in starts]


def key_of(receipt: Receipt) -> Key:
    """What two receipts of one content agree in."""
    return receipt["file"], receipt.get("chunk"), receipt["digest"]


def digest(path: Path, part: range | None = None) -> str:
    """A file's content, or some lines or row groups of it, as a hexadecimal digest."""
    found = hashlib.sha256()
    if part is not None and rows.is_parquet(path):
        groups = rows.RowGroups(path)
        found.update(json.dumps(groups.told_of(part), default=str).encode())
        part = groups.bytes_of(part)
    with path.open("rb") as file:
        if part is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(part.start)
        left = len(part)
        while block := file.read(min(left, rows.BLOCK)):
            found.update(block)
            left -= len(block)
        return found.hexdigest()


def take_digests(chunks: list[Chunk]) -> None:
    """Have the digests of chunks by the time that they are asked for."""
    if len(chunks) < 2:
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(num_cores()) as pool:
        for _ in pool.map(lambda chunk: chunk.digest, chunks):
            pass


class RowNumbers:
    """Rows before a chunk, for messages: counted once one is needed, and going on."""

    def __init__(self) -> None:
        self._counted: dict[Path, tuple[int, int]] = {}

    def before(self, chunk: Chunk) -> int:
        """Lines of its file that come before those of the chunk, or rows."""
        if not (part := chunk.part):
            return 0
        (path,) = chunk.paths
        if rows.is_parquet(path):
            return rows.RowGroups(path).num_rows(range(part.start))
        at, num = self._counted.get(path, (0, 0))
        if at > part.start:
            at = num = 0
        num += rows.num_lines(path, at, part.start)
        self._counted[path] = part.start, num
        return num


@dataclass(frozen=True)
class Task:
    """A chunk to encode; `because`: why Hugging Face's tokenizer has to do it."""

    name: str
    source: Source
    chunk: Chunk
    because: str = ""


@dataclass
class Made:
    """What came of a task: a receipt, or a fault of fastokens, or refused documents.

    Rows, bad ones too, have their number within the chunk. `tokens`: the prefix of
    files that hold what was made, unless it is where it belongs.
    """

    place: str = ""
    receipt: Receipt = field(default_factory=dict)
    fault: str = ""
    refused: list[tuple[int, str]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    tokens: Path | None = None


class ChunkEncoder:
    """Encodes chunks, one after another, of whatever file."""

    def __init__(self, encoder: DocumentEncoder) -> None:
        self.encoder = encoder
        self._first: tuple[tuple[str, Path], Checks] | None = None

    def make(self, task: Task, tokens: Tokens) -> Made:
        """Add a chunk's tokens. Raises DataError where a file cannot be read."""
        chunk, made = task.chunk, Made()
        checks = None if task.because else self._checks(task)
        reader = read(task, chunk)
        documents, before = tokens.num_documents, tokens.num_tokens
        num_checked = 0
        for numbers, texts in batches(reader, task.source, made.bad):
            check = checks.choose(texts) if checks else None
            encoded = self.encoder.encode(texts, check)
            made.fault = encoded.fault
            made.refused = [(numbers[i], token) for i, token in encoded.refused]
            if made.fault or made.refused:
                break
            tokens.add(encoded.ids, encoded.lengths)
            num_checked += len({i for i, _piece in check or ()})
        made.place = reader.place
        if made.fault or made.refused:
            return made
        num_tokens = tokens.num_tokens - before
        made.receipt = {
            **chunk.receipt,
            "documents": tokens.num_documents - documents,
            "tokens": num_tokens,
            "bytes": num_tokens * tokens.dtype.itemsize,
            "content": tokens.take_digest(),
            "bad_rows": len(made.bad),
            "encoder": HUGGING_FACE if task.because else FASTOKENS,
            "checked": num_checked,
            **({"because": task.because} if task.because else {}),
        }
        return made

    def _checks(self, task: Task) -> Checks:
        """What is chosen for a chunk begins here, whatever was encoded before."""
        chunk = task.chunk
        file = task.name, chunk.paths[0] if chunk.paths else Path()
        if not chunk.number:
            self._first = file, Checks()
            return self._first[1]
        if self._first is None or self._first[0] != file:
            checks = Checks()
            for _, texts in batches(read(task, chunk.first), task.source, []):
                checks.choose(texts)
            self._first = file, checks
        return self._first[1].later()


def read(task: Task, chunk: Chunk) -> rows.RowReader[str]:
    """A reader of a chunk's texts."""
    column = task.source.column or "text"

    def take(row: rows.Row) -> str:
        text = row.get(column)
        return text if isinstance(text, str) else rows.field(row, column)

    return rows.read_rows(task.name, task.source, chunk.paths, take, chunk.part)


def batches(
    reader: rows.RowReader[str], source: Source, bad: list[tuple[int, str]]
) -> Iterator[tuple[list[int], list[str]]]:
    """Texts and their rows' numbers, small enough to hold; bad rows are put in `bad`.

    After more of them than are allowed, a few more are looked for, and no texts.
    """
    numbers: list[int] = []
    texts: list[str] = []
    characters = 0
    every = reader.numbered()
    for number, text in every:
        if isinstance(text, rows.BadRow):
            bad.append((number, str(text)))
            if len(bad) > source.max_bad_rows:
                break
            continue
        numbers.append(number)
        texts.append(text)
        characters += len(text)
        if characters > BATCH_CHARACTERS or len(texts) == BATCH_DOCUMENTS:
            yield numbers, texts
            numbers, texts, characters = [], [], 0
    else:
        if texts:
            yield numbers, texts
    for number, text in islice(every, rows.LOOK_ON_ROWS):
        if isinstance(text, rows.BadRow):
            bad.append((number, str(text)))
            if len(bad) >= source.max_bad_rows + rows.EXAMPLES:
                return
