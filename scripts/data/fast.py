"""Token ids by fastokens, held against Hugging Face's tokenizers as they are made.

fastokens is some twenty times faster, and not exact for every text. So part of the
texts is encoded by both: each one of EVERY, and each text with a code point that is
not settled. A code point is settled once NEEDED texts that hold it were encoded
alike: one for most, more for those that normalizers and regexes treat apart (marks,
format characters, spaces, letters that fold to others). Those that Unicode has not
assigned, control characters and private ones never are. A Han or Hangul code point
settles its block of 256: Unicode says the same of all of it. A very long text is
compared in pieces: Hugging Face's needs a hundred times a text's size in memory.

A difference, or any failure of fastokens, is for the caller to answer, by having
Hugging Face's tokenizer encode the whole file. A tokenizer that fastokens refuses is
encoded by Hugging Face's from the start.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from scripts.lib.errors import DataError, UserError
from scripts.lib.indexed import token_dtype

EVERY = 128
PIECE_CHARACTERS = 2_000_000
NEEDED, NEEDED_APART, ALWAYS = 1, 16, 127
NOT_SEEN = -1
CODE_POINTS = 0x110000
ALIKE = (range(0x3400, 0x4DC0), range(0x4E00, 0x9FA6), range(0xAC00, 0xD7A4))
"""Han and Hangul as they have been assigned for long."""

FASTOKENS, HUGGING_FACE = "fastokens", "tokenizers"

Ids = npt.NDArray[Any]
Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Encoded:
    """Texts' ids in a row and each text's number of them; or what went wrong."""

    ids: Ids
    lengths: Ids
    fault: str = ""


class Encoder:
    """One tokenizer, as both libraries have it; `refusal` says why only one does."""

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
        eod_id = self.tokenizer.token_to_id(
            eos["content"] if isinstance(eos, dict) else str(eos)
        )
        if eod_id is None:
            raise DataError(str(config), f"eos_token {eos} is not in the vocabulary")
        self.eod_id: int = eod_id
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())
        self.fast, self.refusal = _fastokens(folder / "tokenizer.json")

    def hugging_face(self, texts: list[str]) -> tuple[Ids, Ids]:
        """Ids of the texts in a row, and each text's number of them."""
        found = [each.ids for each in self.tokenizer.encode_batch_fast(texts)]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.fromiter(chain.from_iterable(found), np.uint32, int(lengths.sum()))
        return ids, lengths

    def fastokens(self, texts: list[str]) -> tuple[Ids, Ids]:
        """The same from fastokens, without a check."""
        global threads_started
        threads_started = True
        ids, ends = self.fast.encode_batch_flat(texts, add_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(ends, "<u8")).astype(
            np.int64
        )

    def checked(self, texts: list[str], check: list[int]) -> tuple[Ids, Ids, str]:
        """Ids of fastokens, and how those of the texts in `check` differ, if they do."""
        try:
            ids, lengths = self.fastokens(texts)
            fault = self._difference(texts, check, ids, lengths)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            fault = f"fastokens failed: {type(error).__name__}: {error}"
        if fault:
            return np.empty(0, np.uint32), np.empty(0, np.int64), fault
        return ids, lengths, ""

    def _difference(
        self, texts: list[str], check: list[int], ids: Ids, lengths: Ids
    ) -> str:
        if len(ids) and ids.max() >= self.vocab_size:
            return f"fastokens gave an id outside of the vocabulary: {ids.max()}"
        short = [i for i in check if len(texts[i]) <= PIECE_CHARACTERS]
        theirs, their_lengths = self.hugging_face([texts[i] for i in short])
        ends, their_ends = np.cumsum(lengths), np.cumsum(their_lengths)
        for n, i in enumerate(short):
            ours = ids[ends[i] - lengths[i] : ends[i]]
            if not np.array_equal(
                ours, theirs[their_ends[n] - their_lengths[n] : their_ends[n]]
            ):
                return f"other ids than Hugging Face's for {texts[i][:80]!r}"
        for i in sorted(set(check) - set(short)):
            for first in range(0, len(texts[i]), PIECE_CHARACTERS):
                piece = [texts[i][first : first + PIECE_CHARACTERS]]
                theirs, _ = self.hugging_face(piece)
                if not np.array_equal(self.fastokens(piece)[0], theirs):
                    return f"other ids than Hugging Face's within {texts[i][:80]!r}"
        return ""

    def encode(
        self, texts: list[str], check: list[int] | None, append_eod: bool
    ) -> Encoded:
        """Ids as they are stored; by Hugging Face's alone where `check` is None."""
        fault = ""
        if check is None:
            ids, lengths = self.hugging_face(texts)
        else:
            ids, lengths, fault = self.checked(texts, check)
        if append_eod:
            some = lengths > 0
            ids = np.insert(ids, np.cumsum(lengths)[some], self.eod_id)
            lengths = lengths + some
        return Encoded(ids.astype(token_dtype(self.vocab_size)), lengths, fault)


def _fastokens(path: Path) -> tuple[Any, str]:
    import fastokens

    try:
        fast = fastokens.Tokenizer.from_file(str(path))
        fast.no_truncation()
        fast.no_padding()
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return None, str(error) or type(error).__name__
    return fast, ""


class Checks:
    """Which texts are encoded twice, decided from the texts in their order alone."""

    def __init__(self) -> None:
        self.num_texts = 0
        self._left = np.full(CODE_POINTS, NOT_SEEN, np.int8)
        self._settled = b""

    def choose(self, texts: list[str]) -> list[int]:
        """Indexes of those of `texts`, which follow the ones seen before."""
        chosen = []
        for i, text in enumerate(texts):
            unsettled = self._unsettled(text)
            if unsettled or self.num_texts % EVERY == 0:
                chosen.append(i)
            if unsettled:
                self._count(text)
            self.num_texts += 1
        return chosen

    def _unsettled(self, text: str) -> bool:
        if text.isascii():
            return bool(text.encode().translate(None, self._settled))
        return bool(self._left[np.frombuffer(text.encode("utf-32-le"), "<u4")].any())

    def _count(self, text: str) -> None:
        left = self._left
        for point in set(map(ord, text)):
            if left[point] == NOT_SEEN:
                left[point] = _needed(chr(point))
            if 0 < left[point] < ALWAYS:
                left[point] -= 1
                if any(point in alike for alike in ALIKE):
                    left[point & ~255 : (point | 255) + 1] = 0
        self._settled = bytes(np.flatnonzero(left[:128] == 0).tolist())


def _needed(char: str) -> int:
    category = unicodedata.category(char)
    if char in " \t\n\r":
        return NEEDED
    if category in ("Cn", "Co", "Cs", "Cc"):
        return ALWAYS
    folded = char.casefold()
    folds = not char.isascii() and (folded.isascii() or len(folded) > 1)
    apart = category[0] == "M" or category in ("Cf", "Zs", "Zl", "Zp")
    return NEEDED_APART if folds or apart else NEEDED


class Workers:
    """Encodes batches on several cores; they come back in the order they went.

    One core needs no second process. At most two batches a worker are on the way,
    so that memory does not grow with the corpus.
    """

    def __init__(
        self, encoder: Encoder, folder: Path, append_eod: bool, num: int
    ) -> None:
        self.encoder, self.append_eod, self.num = encoder, append_eod, num
        self.pool: ProcessPoolExecutor | None = None
        os.environ["RAYON_NUM_THREADS"] = "1"  # the cores are the processes'
        if num > 1:
            # a forked child lacks the threads that fastokens believes it has
            context = multiprocessing.get_context(
                "spawn" if threads_started else "fork"
            )
            _of_parent[:] = [encoder]
            self.pool = ProcessPoolExecutor(num, context, _begin, (folder,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def encode(
        self, batches: Iterable[tuple[Tag, list[str], list[int] | None]]
    ) -> Iterator[tuple[Tag, Encoded]]:
        """Each batch's tag and ids. Raises UserError where a worker was killed."""
        if not self.pool:
            for tag, texts, check in batches:
                yield tag, self.encoder.encode(texts, check, self.append_eod)
            return
        waiting: deque[tuple[Tag, Future[Encoded]]] = deque()
        try:
            for tag, texts, check in batches:
                waiting.append(
                    (tag, self.pool.submit(_work, texts, check, self.append_eod))
                )
                if len(waiting) >= 2 * self.num:
                    tag, future = waiting.popleft()
                    yield tag, future.result()
            while waiting:
                tag, future = waiting.popleft()
                yield tag, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "tokenize", "a worker was killed", "give the node more memory"
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


threads_started = False
_of_parent: list[Encoder] = []
_own: list[Encoder] = []


def _begin(folder: Path) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    _own[:] = _of_parent or [Encoder(folder)]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)  # else a worker outlives a killed parent, and holds its lock

    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()


def _work(texts: list[str], check: list[int] | None, append_eod: bool) -> Encoded:
    return _own[0].encode(texts, check, append_eod)
