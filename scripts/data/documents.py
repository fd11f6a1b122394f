"""Documents' ids as preprocess_data.py makes them.

Each is made by fastokens and checked, or by Hugging Face's tokenizer
(`scripts.data.fast`). What text of special tokens becomes is a setting; a document
that holds some is encoded by Hugging Face's once more, with `encode_special_tokens`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.data import fast
from scripts.data.fast import Ids, Part, split
from scripts.lib.errors import DataError
from scripts.lib.indexed import token_dtype
from scripts.lib.schema import TokenizeRecipe


@dataclass(frozen=True)
class Encoded:
    """Documents' ids in a row and each one's number of them; or what went wrong.

    `fault` is what fastokens did wrong; `refused` are documents, by their index, with
    a special token that may not be there.
    """

    ids: Ids
    lengths: Ids
    fault: str = ""
    refused: tuple[tuple[int, str], ...] = ()


class DocumentEncoder(fast.Encoder):
    """A folder's tokenizer, and what a recipe wants of it."""

    def __init__(self, folder: Path, recipe: TokenizeRecipe) -> None:
        import tokenizers

        config = folder / "tokenizer_config.json"
        try:
            content = fast.with_short_merges((folder / "tokenizer.json").read_bytes())
            tokenizer = tokenizers.Tokenizer.from_str(content)
            eos = json.loads(config.read_text())["eos_token"]
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(
                str(folder),
                f"not a tokenizer's folder: {type(error).__name__}: {error}",
                "tokenizer.json, and tokenizer_config.json with `eos_token`, are "
                "needed; the tokenizer stage writes both",
            ) from error
        eod_id = tokenizer.token_to_id(
            eos["content"] if isinstance(eos, dict) else str(eos)
        )
        if eod_id is None:
            raise DataError(str(config), f"eos_token {eos} is not in the vocabulary")
        super().__init__(tokenizer, add_special_tokens=True, content=content)
        self.eod_id: int = eod_id
        self.append_eod, self.special_tokens = recipe.append_eod, recipe.special_tokens
        added = tokenizer.get_added_tokens_decoder()
        self._special = {
            id: token.content for id, token in added.items() if token.special
        }
        self._is_special = np.zeros(self.vocab_size, np.bool_)
        self._is_special[list(self._special)] = True
        self._num_added = int(self._is_special[tokenizer.encode("").ids].sum())

    def encode(self, texts: list[str], check: list[Part] | None) -> Encoded:
        """Ids as they are stored; by Hugging Face's alone where `check` is None."""
        if check is None:
            ids, lengths = self.hugging_face(texts)
        else:
            ids, lengths, fault = self.checked(texts, check)
            if fault:
                return Encoded(ids, lengths, fault)
        if self.special_tokens != "keep":
            which = self._with_special(ids, lengths)
            if which and self.special_tokens == "refuse":
                found = [(i, self._special_text(texts[i])) for i in which]
                if refused := tuple((i, token) for i, token in found if token):
                    return Encoded(ids, lengths, refused=refused)
            elif which:
                ids, lengths = self._escaped(texts, ids, lengths, which)
        if self.append_eod:
            some = lengths > 0
            ids = np.insert(ids, np.cumsum(lengths)[some], self.eod_id)
            lengths = lengths + some
        return Encoded(ids.astype(token_dtype(self.vocab_size)), lengths)

    def _with_special(self, ids: Ids, lengths: Ids) -> list[int]:
        """Documents with more special ids than the tokenizer itself adds.

        Some models have one for what they do not know, so it need not be from text.
        """
        before = np.append(0, np.cumsum(self._is_special[ids]))
        ends = np.cumsum(lengths)
        num = before[ends] - before[ends - lengths]
        return [int(i) for i in np.flatnonzero(num > self._num_added)]

    def _as_text(self, texts: list[str]) -> tuple[Ids, Ids]:
        self.tokenizer.encode_special_tokens = True
        try:
            return self.hugging_face(texts)
        finally:
            self.tokenizer.encode_special_tokens = False

    def _escaped(
        self, texts: list[str], ids: Ids, lengths: Ids, which: list[int]
    ) -> tuple[Ids, Ids]:
        """The same, with the ids of documents `which` as if no token were special."""
        documents = split(ids, lengths)
        plain = split(*self._as_text([texts[i] for i in which]))
        for i, found in zip(which, plain, strict=True):
            documents[i] = found
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return np.concatenate(documents), lengths

    def _special_text(self, text: str) -> str:
        """The first special token that a text of its own becomes, if one does."""
        ids = self.hugging_face([text])[0].tolist()
        extra = Counter(ids) - Counter(self._as_text([text])[0].tolist())
        return next(
            (self._special[i] for i in ids if i in extra and i in self._special), ""
        )
