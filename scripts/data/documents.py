"""Documents' ids as preprocess_data.py makes them, on as many cores as there are.

Each is made by fastokens and checked, or by Hugging Face's tokenizer
(`scripts.data.fast`). What text of special tokens becomes is a setting; a document
that holds some is encoded by Hugging Face's once more, with `encode_special_tokens`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from scripts.data import fast
from scripts.data.fast import Ids, Part, split
from scripts.lib.errors import DataError, UserError
from scripts.lib.indexed import token_dtype
from scripts.lib.schema import TokenizeRecipe

Tag = TypeVar("Tag")


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


NOTHING = Encoded(np.empty(0, np.int32), np.empty(0, np.int64))


class DocumentEncoder(fast.Encoder):
    """A folder's tokenizer, and what a recipe wants of it."""

    def __init__(self, folder: Path, recipe: TokenizeRecipe) -> None:
        import tokenizers

        config = folder / "tokenizer_config.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
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
        super().__init__(tokenizer, add_special_tokens=True)
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


class Workers:
    """Encodes batches on several cores; they come back in the order they went.

    One core needs no second process. At most two batches a worker are on the way,
    so that memory does not grow with the corpus. Each worker has a connection of its
    own, which ends with it: what is shared, as in ProcessPoolExecutor, can be left
    locked or half written by one that is killed, and all would wait forever.
    """

    def __init__(
        self, encoder: DocumentEncoder, folder: Path, recipe: TokenizeRecipe, num: int
    ) -> None:
        self.encoder, self.folder, self.recipe, self.num = encoder, folder, recipe, num
        self.processes: list[BaseProcess] = []
        self.idle: SimpleQueue[Connection] = SimpleQueue()
        self.threads = ThreadPoolExecutor(num)
        fast.use_threads(1)  # the cores are the processes'

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.join()

    def encode(
        self, batches: Iterable[tuple[Tag, list[str], list[Part] | None]]
    ) -> Iterator[tuple[Tag, Encoded]]:
        """Each batch's tag and ids. Raises UserError where a worker was killed."""
        waiting: deque[tuple[Tag, Future[Encoded]]] = deque()
        try:
            for tag, texts, check in batches:
                waiting.append((tag, self._submit(texts, check)))
                if self.num == 1 or len(waiting) >= 2 * self.num:
                    tag, future = waiting.popleft()
                    yield tag, future.result()
            while waiting:
                tag, future = waiting.popleft()
                yield tag, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _submit(self, texts: list[str], check: list[Part] | None) -> Future[Encoded]:
        if texts and self.num > 1:
            if not self.processes:
                self._start()
            return self.threads.submit(self._ask, texts, check)
        done: Future[Encoded] = Future()
        done.set_result(self.encoder.encode(texts, check) if texts else NOTHING)
        return done

    def _start(self) -> None:
        context = multiprocessing.get_context(
            "spawn" if fast.threads_started else "fork"
        )
        _of_parent[:] = [self.encoder]
        for _ in range(self.num):
            ours, its = context.Pipe()
            process = context.Process(
                target=_serve, args=(its, self.folder, self.recipe), daemon=True
            )
            process.start()
            its.close()  # before the next one starts, which would hold it too
            self.processes.append(process)
            self.idle.put(ours)

    def _ask(self, texts: list[str], check: list[Part] | None) -> Encoded:
        worker = self.idle.get()
        try:
            worker.send((texts, check))
            found = worker.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                "tokenize",
                "a worker was killed, as happens where memory is short",
                "give the node more memory, or fewer cpus; a rerun goes on at the file "
                "it was at",
            ) from error
        finally:
            self.idle.put(worker)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Encoded)
        return found


_of_parent: list[DocumentEncoder] = []


def _serve(connection: Connection, folder: Path, recipe: TokenizeRecipe) -> None:
    """Encode what comes until the parent ends, whose interruption is its own matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fast.use_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    encoder = _of_parent[0] if _of_parent else DocumentEncoder(folder, recipe)
    while True:
        texts, check = connection.recv()
        try:
            found: Encoded | Exception = encoder.encode(texts, check)
        except Exception as error:
            found = error
        connection.send(found)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # else a worker outlives a killed parent, and holds its lock
