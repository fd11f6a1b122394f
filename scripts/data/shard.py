"""A Megatron bin/idx pair written chunk by chunk, which can go back to a chunk's start.

The bytes are those of `scripts.lib.indexed`, which describes the format. Lengths of
documents wait in a file, so memory grows neither with tokens nor with documents.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from scripts.lib.indexed import CODES, HEAD, MAGIC, VERSION, token_dtype

BLOCK, AT_ONCE = 1 << 20, 1 << 17

Array = npt.NDArray[Any]


class Tokens:
    """Documents' ids, written to one file, and their lengths, to another."""

    def __init__(self, ids: BinaryIO, sizes: BinaryIO, vocab_size: int) -> None:
        self.dtype = token_dtype(vocab_size)
        self.num_documents = self.num_tokens = 0
        self._bin, self._sizes = ids, sizes
        self._digests = hashlib.sha256(), hashlib.sha256()

    def add(self, ids: Array, lengths: Array) -> None:
        """Append documents: their ids in a row, and how many are each one's."""
        contents = np.ascontiguousarray(ids, self.dtype), lengths.astype("<i4")
        for file, digest, content in zip(
            (self._bin, self._sizes), self._digests, contents, strict=True
        ):
            file.write(content.data)
            digest.update(content.data)
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)

    def take_digest(self) -> str:
        """Digest of what was added since the last one was taken, or since `go_back`."""
        found = "".join(digest.hexdigest()[:32] for digest in self._digests)
        self._digests = hashlib.sha256(), hashlib.sha256()
        return found

    def flush(self) -> None:
        """Have on disk what was added, for a later run to find."""
        self._bin.flush()
        self._sizes.flush()

    def close(self) -> None:
        """Leave the files as they are."""
        self._bin.close()
        self._sizes.close()


class Apart(Tokens):
    """Tokens in PREFIX.ids and PREFIX.sizes, until a shard takes them.

    Files that are there are written over, which costs half of writing new ones.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        ids, sizes = (open(p, "wb", opener=_as_it_is) for p in apart(prefix))
        super().__init__(ids, sizes, vocab_size)


def apart(prefix: Path) -> tuple[Path, Path]:
    """The files of such tokens."""
    return prefix.with_suffix(".ids"), prefix.with_suffix(".sizes")


def _as_it_is(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


class Shard(Tokens):
    """Writes PREFIX.bin and PREFIX.idx; neither name exists before `finish`.

    `sizes` is a file for the documents' lengths. What PREFIX.bin.tmp and it hold of
    an earlier run is kept as far as `go_back` is told, and dropped without.
    """

    def __init__(self, prefix: Path, sizes: Path, vocab_size: int) -> None:
        self.prefix, self.sizes = prefix, sizes
        tokens = prefix.with_name(f"{prefix.name}.bin.tmp")
        super().__init__(tokens.open("ab"), sizes.open("ab"), vocab_size)

    def holds(self, num_documents: int, num_tokens: int) -> bool:
        """Whether the files are long enough to go on from there."""
        return (
            self._bin.tell() >= num_tokens * self.dtype.itemsize
            and self._sizes.tell() >= num_documents * 4
        )

    def go_back(self, num_documents: int, num_tokens: int) -> None:
        """Drop what came after this many documents and tokens."""
        self.flush()
        self._bin.truncate(num_tokens * self.dtype.itemsize)
        self._sizes.truncate(num_documents * 4)
        self.num_documents, self.num_tokens = num_documents, num_tokens
        self._digests = hashlib.sha256(), hashlib.sha256()

    def append(self, prefix: Path, num_documents: int, num_tokens: int) -> None:
        """Append what was written apart."""
        counts = num_tokens * self.dtype.itemsize, num_documents * 4
        files = self._bin, self._sizes
        for path, file, left in zip(apart(prefix), files, counts, strict=True):
            with path.open("rb", buffering=0) as content:
                while block := content.read(min(left, AT_ONCE)):
                    file.write(block)
                    left -= len(block)
        self.num_documents += num_documents
        self.num_tokens += num_tokens

    def finish(self) -> None:
        """Write the index and give both files their names, the index last."""
        self.close()
        index = self.prefix.with_name(f"{self.prefix.name}.idx.tmp")
        num_sequences = sum(int(np.count_nonzero(b)) for b in self._blocks())
        code = next(code for code, dtype in CODES.items() if dtype == self.dtype)
        with index.open("wb") as file:
            file.write(
                HEAD.pack(MAGIC, VERSION, code, num_sequences, self.num_documents + 1)
            )
            for block in self._blocks():
                file.write(block[block > 0].tobytes())
            itemsize = self.dtype.itemsize
            for first in self._running(lambda b: b[b > 0] * np.int64(itemsize)):
                file.write(first[:-1].astype("<i8").tobytes())
            file.write(bytes(8))
            for first in self._running(lambda b: (b > 0).astype(np.int64)):
                file.write(first[1:].astype("<i8").tobytes())
        for suffix in (".bin", ".idx"):
            name = f"{self.prefix.name}{suffix}"
            self.prefix.with_name(f"{name}.tmp").replace(self.prefix.with_name(name))
        self.sizes.unlink()

    def _blocks(self) -> Iterator[Array]:
        with self.sizes.open("rb") as file:
            while content := file.read(4 * BLOCK):
                yield np.frombuffer(content, "<i4")

    def _running(self, of: Callable[[Array], Array]) -> Iterator[Array]:
        """Sums up to each item of the blocks, the sum before a block in front."""
        total = 0
        for block in self._blocks():
            sums = np.cumsum(np.concatenate([[total], of(block)]), dtype=np.int64)
            yield sums
            total = int(sums[-1])
