"""What is known of chunks that were tokenized, and how to take their tokens over.

A folder of tokens has receipts.json, or one NAME.receipts.jsonl a source while it is
made. A chunk's tokens depend on its content and on its source's `settings` alone, never
on others; so what an earlier folder holds of a chunk is copied where the receipts
agree, and kept where the digest of the copy is the one that the receipt tells. Only the
library that made them is one for all chunks of a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.chunks import Chunk, Key, Receipt, key_of
from scripts.data.shard import BLOCK, Array, Shard
from scripts.lib.errors import DataError
from scripts.lib.indexed import IndexedReader

RECEIPTS = "receipts.json"
FINISHED = {"finished": True}


def journal(folder: Path, name: str) -> Path:
    """The receipts of a source that is being made, a line each."""
    return folder / f"{name}.receipts.jsonl"


def sizes(folder: Path, name: str) -> Path:
    """The lengths of the documents of a source that is being made."""
    return folder / f"{name}.sizes.tmp"


@dataclass(frozen=True)
class Told:
    """Receipts of a source in a folder, in order; `finished`: bin and idx are named."""

    settings: dict[str, Any]
    files: list[Receipt]
    finished: bool

    @classmethod
    def of(cls, folder: Path, name: str) -> Told:
        """What the folder tells, or one beside it; nothing where it is not readable."""
        if lines := read_lines(journal(folder, name)):
            finished = lines[-1] == FINISHED
            return cls(lines[0], lines[1 : -1 if finished else None], finished)
        for place in (folder, folder.parent):
            try:
                found = json.loads((place / RECEIPTS).read_text())["sources"][name]
                return cls(found["settings"], found["files"], True)
            except (OSError, ValueError, LookupError, TypeError):
                continue
        return cls({}, [], False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file's JSON lines, as far as they are whole; none where it is missing."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError):
        return []


class Earlier:
    """A source's tokens in an earlier folder, as far as they were made like this."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.folder, self.name = folder, name
        told = Told.of(folder, name)
        self.finished = told.finished
        self._starts: dict[Key, tuple[Receipt, int, int]] = {}
        documents = tokens = 0
        for receipt in told.files if told.settings == settings else ():
            self._starts[key_of(receipt)] = receipt, documents, tokens
            documents += receipt["documents"]
            tokens += receipt["tokens"]
        self._names = {(file, number) for file, number, _digest in self._starts}

    def names(self, chunk: Chunk) -> bool:
        """Whether it has a chunk of that file and number, as it was then."""
        return (chunk.file, chunk.number) in self._names

    def has(self, chunk: Chunk) -> bool:
        """Whether it has the same content under the same name."""
        return key_of(chunk.receipt) in self._starts

    def receipt(self, chunk: Chunk) -> Receipt:
        """The receipt of a chunk that it has."""
        return self._starts[key_of(chunk.receipt)][0]

    def copy(self, receipt: Receipt, shard: Shard) -> bool:
        """Add a chunk's tokens to a shard; False where they are not what was written.

        The caller has the shard go back then.
        """
        _, first_document, first_token = self._starts[key_of(receipt)]
        tokens = self.folder / f"{self.name}{'.bin' if self.finished else '.bin.tmp'}"
        end = first_token + receipt["tokens"]
        try:
            lengths = self._lengths(first_document, receipt["documents"])
            for first in range(first_token, end, BLOCK):
                count = min(BLOCK, end - first)
                shard.add(_read(tokens, shard.dtype, first, count), lengths[:0])
        except (DataError, LookupError, ValueError):  # a damaged index tells anything
            return False
        shard.add(lengths[:0], lengths)
        return bool(shard.take_digest() == receipt["content"])

    def _lengths(self, first: int, count: int) -> Array:
        if not self.finished:
            lengths = sizes(self.folder, self.name)
            return _read(lengths, np.dtype("<i4"), first, count)
        starts = self._index.documents[first : first + count + 1]
        some = np.diff(starts) > 0
        found = np.zeros(len(some), np.int32)
        found[some] = self._index.sizes[starts[0] : starts[-1]]
        return found

    @cached_property
    def _index(self) -> IndexedReader:
        return IndexedReader(self.folder / self.name)


def _read(path: Path, dtype: Any, first: int, count: int) -> Array:
    try:
        return np.fromfile(path, dtype, count, offset=first * dtype.itemsize)
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error}") from error
