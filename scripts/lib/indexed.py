r"""Megatron's indexed dataset: token sequences in PREFIX.bin, their index in PREFIX.idx.

The format is that of megatron.core.datasets.indexed_dataset (Megatron-LM), read
from its IndexedDatasetBuilder and _IndexReader; a test holds the bytes equal.

    .bin  the tokens, one sequence after another: uint16 or int32
    .idx  b"MMIDIDX\0\0", version 1 (uint64), dtype code (uint8),
          number of sequences, number of document entries (uint64 each),
          tokens of each sequence (int32), its first byte in .bin (int64),
          the sequence each document starts at, and one past the last (int64)

All little endian. A document here is one sequence; an empty one is a document
entry without a sequence, as preprocess_data.py writes it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.lib.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEAD = struct.Struct("<9sQBQQ")
UINT16: np.dtype[Any] = np.dtype("<u2")
INT32: np.dtype[Any] = np.dtype("<i4")
CODES = {4: INT32, 8: UINT16}
UINT16_VOCABULARY = 65500


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron picks for a vocabulary (`DType.optimal_dtype`)."""
    return UINT16 if vocab_size < UINT16_VOCABULARY else INT32


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; neither name exists before `finish`."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix, self.vocab_size = prefix, vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = self.num_documents = 0
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._bin = _temporary(_file(prefix, ".bin")).open("wb")

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        """Append documents. Raises ValueError for an id outside the vocabulary."""
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        num_tokens = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(documents), np.int64, num_tokens)
        if num_tokens and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"token id {ids.max() if ids.min() >= 0 else ids.min()} is outside "
                f"the vocabulary of {self.vocab_size}"
            )
        self._bin.write(ids.astype(self.dtype).tobytes())
        self._lengths.append(lengths)
        self.num_tokens += num_tokens
        self.num_documents += len(documents)

    def finish(self) -> None:
        """Write the index and give both files their names, the index last."""
        self._bin.close()
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int64)])
        sizes = lengths[lengths > 0]
        pointers = np.zeros(len(sizes), np.int64)
        np.cumsum(sizes[:-1] * self.dtype.itemsize, out=pointers[1:])
        documents = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths > 0, out=documents[1:])
        code = next(code for code, dtype in CODES.items() if dtype == self.dtype)
        index = _file(self.prefix, ".idx")
        with _temporary(index).open("wb") as file:
            file.write(HEAD.pack(MAGIC, VERSION, code, len(sizes), len(documents)))
            file.write(sizes.astype("<i4").tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(documents.astype("<i8").tobytes())
        for path in (_file(self.prefix, ".bin"), index):
            _temporary(path).replace(path)


class IndexedReader:
    """Maps PREFIX.bin and PREFIX.idx; item i is the tokens of sequence i.

    `tokens` is all of them in a row, `sizes` the sequences' lengths, `documents`
    the sequence each document starts at and one past the last.
    Raises DataError where the files are not of the format or disagree.
    """

    def __init__(self, prefix: Path) -> None:
        index = _file(prefix, ".idx")
        try:
            content = index.read_bytes()
            bin_bytes = _file(prefix, ".bin").stat().st_size
        except OSError as error:
            raise DataError(str(prefix), f"cannot be read: {error}") from error
        if len(content) < HEAD.size:
            raise DataError(str(index), "cut short: no whole header")
        magic, version, code, num_sizes, num_documents = HEAD.unpack_from(content)
        if magic != MAGIC or version != VERSION or code not in CODES:
            raise DataError(str(index), "not an index of tokens in Megatron's format")
        expected = HEAD.size + 12 * num_sizes + 8 * num_documents
        if len(content) != expected:
            raise DataError(str(index), f"{len(content)} bytes, not {expected}")
        self.dtype = CODES[code]
        offset = HEAD.size
        self.sizes = np.frombuffer(content, "<i4", num_sizes, offset)
        offset += self.sizes.nbytes
        self.pointers = np.frombuffer(content, "<i8", num_sizes, offset)
        offset += self.pointers.nbytes
        self.documents = np.frombuffer(content, "<i8", num_documents, offset)
        num_tokens = int(self.sizes.sum(dtype=np.int64))
        if bin_bytes != num_tokens * self.dtype.itemsize:
            raise DataError(
                str(_file(prefix, ".bin")),
                f"{bin_bytes} bytes, where the index tells of {num_tokens} tokens",
            )
        self.tokens: npt.NDArray[Any] = np.empty(0, self.dtype)
        if num_tokens:
            self.tokens = np.memmap(_file(prefix, ".bin"), self.dtype, "r")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, sequence: int) -> npt.NDArray[Any]:
        start = int(self.pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[sequence])]


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
