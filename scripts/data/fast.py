"""Token ids by fastokens, held against Hugging Face's tokenizers as they are made.

fastokens is some twenty times faster, and not exact for every text. So part of the
texts is encoded by both: a sample, and each text with a code point that is not settled;
of a longer one, the pieces where it has them first. A code point is settled once NEEDED
texts that hold it were encoded alike: one for most, more for those that normalizers and
regexes treat apart (marks, format characters, spaces, letters that fold to others).
Those that Unicode has not assigned, control characters and private ones never are, and
printable ones of ASCII always. A Han or Hangul code point settles its block of 256:
Unicode says the same of all of it.

The sample is each one of EVERY among the first texts, of MANY on each one of EVERY_LATER:
whole texts, the first part of a very long one. In later chunks of a file that is cut it
is each one of EVERY_LATER, the first one too, and what the first chunk settles is settled
(`scripts.data.chunks`). What is wrong for one text of n is missed with a chance of
(1 - 1/n) to the power of their number: of 10,000 texts 40 are encoded twice, which find
with 95% what is wrong for one of 14; of a million about 2,000, one of 670.

A difference, or any failure of fastokens, is for the caller to answer, by having
Hugging Face's tokenizer encode all of the file. A tokenizer that fastokens refuses is
encoded by Hugging Face's from the start.
"""

from __future__ import annotations

import os
import unicodedata
from copy import copy
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

EVERY, MANY, EVERY_LATER = 256, 1 << 14, 512
SAMPLE_CHARACTERS = 16_384
PIECE_CHARACTERS, CONTEXT_CHARACTERS = 512, 64
NEEDED, NEEDED_APART, ALWAYS = 1, 16, 127
NOT_SEEN = -1
CODE_POINTS = 0x110000
ALIKE = (range(0x3400, 0x4DC0), range(0x4E00, 0x9FA6), range(0xAC00, 0xD7A4))
"""Han and Hangul as they have been assigned for long."""

Ids = npt.NDArray[Any]
Part = tuple[int, slice]
"""The index of a text, and what of it is encoded twice."""
WHOLE = slice(None)

threads_started = False
"""Whether fastokens has threads here, which a forked process would lack."""


def num_cores() -> int:
    """The cores that a node has: OMP_NUM_THREADS, or all that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    found = int(wanted) if wanted.isdecimal() else len(os.sched_getaffinity(0))
    return max(1, found)


def use_threads(num: int) -> None:
    """Let both libraries use this many cores; they look once, as they start to encode.

    One thread of fastokens' own beside the caller's waits by spinning, and has a cache
    of words to fill for itself.
    """
    os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = str(num)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num > 1 else "false"


class Encoder:
    """One tokenizer, as both libraries have it; `refusal` says why only one does.

    `add_special_tokens`: whether ids are those of whole texts, with the BOS and the
    like that the tokenizer adds, or of parts of texts. `content`: the tokenizer.json,
    where it is at hand.
    """

    def __init__(
        self, tokenizer: Any, add_special_tokens: bool, content: str = ""
    ) -> None:
        self.tokenizer, self.add_special_tokens = tokenizer, add_special_tokens
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())
        self.fast, self.refusal = _fastokens(content or tokenizer.to_str())

    def hugging_face(self, texts: list[str]) -> tuple[Ids, Ids]:
        """Ids of the texts in a row, and each text's number of them."""
        encodings = self.tokenizer.encode_batch_fast(
            texts, add_special_tokens=self.add_special_tokens
        )
        found = [each.ids for each in encodings]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.fromiter(chain.from_iterable(found), np.uint32, int(lengths.sum()))
        return ids, lengths

    def fastokens(self, texts: list[str]) -> tuple[Ids, Ids]:
        """The same from fastokens, without a check."""
        global threads_started
        threads_started = True
        ids, ends = self.fast.encode_batch_flat(
            texts, add_special_tokens=self.add_special_tokens
        )
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(ends, "<u8")).astype(
            np.int64
        )

    def checked(self, texts: list[str], check: list[Part]) -> tuple[Ids, Ids, str]:
        """Ids of fastokens, and how those of what is in `check` differ, if they do."""
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
        self, texts: list[str], check: list[Part], ids: Ids, lengths: Ids
    ) -> str:
        if len(ids) and ids.max() >= self.vocab_size:
            return f"fastokens gave an id outside of the vocabulary: {ids.max()}"
        ends = np.cumsum(lengths)
        whole = [i for i, part in check if part == WHOLE]
        ours = [ids[ends[i] - lengths[i] : ends[i]] for i in whole]
        pieces = [texts[i][part] for i, part in check if part != WHOLE]
        if pieces:
            ours += split(*self.fastokens(pieces))
        parts = [texts[i] for i in whole] + pieces
        for part, one, other in zip(
            parts, ours, split(*self.hugging_face(parts)), strict=True
        ):
            if not np.array_equal(one, other):
                return f"other ids than Hugging Face's for {part[:80]!r}"
        return ""


def split(ids: Ids, lengths: Ids) -> list[Ids]:
    """Each text's ids."""
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def with_short_merges(content: bytes) -> str:
    """A tokenizer.json that says the same, and is read in three quarters of the time.

    Merges are pairs; both libraries also take them as strings with a space between,
    as they were written before tokens could hold spaces.
    """
    import orjson

    found = orjson.loads(content)
    pairs = found["model"].get("merges")
    if pairs and isinstance(pairs[0], list):
        merges = list(map(" ".join, pairs))
        # a string of two spaces is no merge, nor is one that begins with #version
        if "".join(merges).count(" ") == len(merges) and b"#version" not in content:
            found["model"]["merges"] = merges
            return orjson.dumps(found).decode()
    return content.decode()


def _fastokens(content: str) -> tuple[Any, str]:
    import fastokens

    try:
        found = fastokens.Tokenizer.from_json_str(content)
        found.no_truncation()
        found.no_padding()
        return found, ""
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return None, str(error) or type(error).__name__


class Checks:
    """What is encoded twice, decided from the texts in their order alone."""

    def __init__(self) -> None:
        self.num_texts = 0
        self._left = np.full(CODE_POINTS, NOT_SEEN, np.int8)
        self._left[[*range(0x20, 0x7F), *b"\t\n\r"]] = 0
        self._settle()

    def later(self) -> Checks:
        """For other texts of the kind: what is settled stays, the sample is of MANY."""
        found = copy(self)
        found._left, found.num_texts = self._left.copy(), MANY
        return found

    def choose(self, texts: list[str]) -> list[Part]:
        """What of `texts`, which follow the ones seen before."""
        chosen: list[Part] = []
        for i, text in enumerate(texts):
            every = EVERY if self.num_texts < MANY else EVERY_LATER
            sampled = self.num_texts % every == 0
            self.num_texts += 1
            pieces = self._pieces(text) if self._unsettled(text) else []
            if sampled:
                whole = len(text) <= SAMPLE_CHARACTERS
                pieces = [WHOLE] if whole else [slice(0, SAMPLE_CHARACTERS), *pieces]
            if pieces:
                chosen += [(i, piece) for piece in pieces]
        return chosen

    def _unsettled(self, text: str) -> bool:
        """Whether a text has a code point that is not settled."""
        if text.isascii():
            return bool(text.encode().translate(None, self._settled))
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        return bool(self._left[points].any())

    def _pieces(self, text: str) -> list[slice]:
        """Where a text has what is not settled for the first time, and counts it."""
        wanted = self._count(text)
        if len(text) <= 2 * PIECE_CHARACTERS:
            return [WHOLE]
        found = []
        for first in range(0, len(text), PIECE_CHARACTERS):
            last = first + PIECE_CHARACTERS
            if here := wanted.intersection(text[first:last]):
                start = max(0, first - CONTEXT_CHARACTERS)
                found.append(slice(start, last + CONTEXT_CHARACTERS))
                seen = {p for p in map(_first, here) if self._left[p] != ALWAYS}
                wanted = {char for char in wanted if _first(char) not in seen}
        return found

    def _count(self, text: str) -> set[str]:
        """Count what of a text is not settled; tell which characters those were."""
        left = self._left
        found = {char for char in set(text) if left[ord(char)]}
        for point in set(map(_first, found)):
            if left[point] == NOT_SEEN:
                left[point] = _needed(chr(point))
            if left[point] < ALWAYS:
                left[point] -= 1
            if not left[point] and _settles_all(point):
                (stop,) = (alike.stop for alike in ALIKE if point in alike)
                left[point : min(point + 256, stop)] = 0
        self._settle()
        return found

    def _settle(self) -> None:
        self._settled = bytes(np.flatnonzero(self._left[:128] == 0).tolist())


def _first(char: str) -> int:
    """A code point, or the first of its block where one settles all."""
    point = ord(char)
    return point & ~255 if _settles_all(point) else point


def _settles_all(point: int) -> bool:
    return point >= ALIKE[0].start and any(point in alike for alike in ALIKE)


def _needed(char: str) -> int:
    category = unicodedata.category(char)
    if category in ("Cn", "Co", "Cs", "Cc"):
        return ALWAYS
    folded = char.casefold()
    folds = not char.isascii() and (folded.isascii() or len(folded) > 1)
    apart = category[0] == "M" or category in ("Cf", "Zs", "Zl", "Zp")
    return NEEDED_APART if folds or apart else NEEDED
