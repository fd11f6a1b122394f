"""Chunks encoded on several cores, each read, encoded and written by one process.

A process goes on with the file that it was at, and begins one before it helps with
another's: what the first chunk of a file settles is found out by each process that has
a later one. So up to AHEAD chunks a process wait, in files, for those before them. One
that is at a chunk has the next one already, and never waits to be given it. Each
process has a connection of its own, which ends with it: what is shared, as in
ProcessPoolExecutor, can be left locked or half written by one that is killed, and all
would wait forever.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from shutil import rmtree
from typing import Any

from scripts.data import fast
from scripts.data.chunks import ChunkEncoder, Made, Task
from scripts.data.documents import DocumentEncoder
from scripts.data.shard import Apart
from scripts.lib.errors import UserError
from scripts.lib.schema import TokenizeRecipe

AHEAD = 8
AT_ONCE = 2


@dataclass
class Worker:
    """A process, the tasks that it has, and the file of the last one."""

    process: BaseProcess
    connection: Connection
    tasks: list[int] = field(default_factory=list)
    file: list[Path] | None = None

    def prefers(self, task: Task) -> int:
        """0 for the best there is."""
        if task.chunk.paths == self.file:
            return 0
        return 2 if task.chunk.number else 1


class Workers:
    """Processes that make chunks, which come in the order of their tasks."""

    def __init__(
        self,
        encoder: DocumentEncoder,
        tokenizer: Path,
        recipe: TokenizeRecipe,
        num: int,
    ) -> None:
        self._args, self.num = (encoder, tokenizer, recipe), num
        self.workers: list[Worker] = []
        self.num_prefixes = 0
        self.free: list[Path] = []

    def _start(self) -> None:
        encoder, tokenizer, recipe = self._args
        fork = not fast.threads_started
        context: Any = get_context("fork" if fork else "spawn")
        for _ in range(self.num):
            ours, its = context.Pipe()
            args = (its, encoder if fork else None, tokenizer, recipe)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            its.close()  # before the next one starts, which would hold it too
            self.workers.append(Worker(process, ours))

    def close(self) -> None:
        """End the processes, whatever they are at; others start where more is made."""
        while self.workers:
            worker = self.workers.pop()
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def make(self, tasks: list[Task], folder: Path) -> Generator[Made]:
        """What came of each task; tokens are in files in `folder`, until the next.

        Raises what a process raised in a chunk's turn, and UserError where one was
        killed. Whoever wants no more of them closes it: nothing is written after that.
        """
        if not self.workers:
            self._start()
        rmtree(folder, ignore_errors=True)  # what a killed run left
        folder.mkdir()
        self.free = []
        waiting: list[int] = []
        made: dict[int, Made | Exception] = {}
        num_seen = 0
        try:
            for number in range(len(tasks)):
                last = min(len(tasks), number + AHEAD * len(self.workers))
                waiting += range(num_seen, last)
                num_seen = max(num_seen, last)
                while number not in made:
                    self._give(tasks, waiting, folder)
                    self._take(made)
                self._take(made, seconds=0)
                self._give(tasks, waiting, folder)
                found = made.pop(number)
                if isinstance(found, Exception):
                    raise found
                yield found
                if found.tokens:
                    self.free.append(found.tokens)
        finally:
            if any(worker.tasks for worker in self.workers):
                self.close()

    def _give(self, tasks: list[Task], waiting: list[int], folder: Path) -> None:
        for has in range(AT_ONCE):
            for worker in self.workers:
                left = len(waiting) > (len(self.workers) if has else 0)
                if len(worker.tasks) == has and left:
                    best = min(waiting, key=lambda i: (worker.prefers(tasks[i]), i))
                    waiting.remove(best)
                    worker.tasks.append(best)
                    worker.file = tasks[best].chunk.paths
                    if not self.free:
                        self.num_prefixes += 1
                        self.free.append(folder / str(self.num_prefixes))
                    _send(worker, (tasks[best], self.free.pop()))

    def _take(
        self, made: dict[int, Made | Exception], seconds: float | None = None
    ) -> None:
        busy = {w.connection: w for w in self.workers if w.tasks}
        for connection in wait([*busy], seconds):
            worker = busy[connection]  # type: ignore[index]
            try:
                found = worker.connection.recv()
            except (EOFError, OSError) as error:
                raise _killed() from error
            made[worker.tasks.pop(0)] = found


def _send(worker: Worker, what: tuple[Task, Path]) -> None:
    try:
        worker.connection.send(what)
    except OSError as error:
        raise _killed() from error


def _killed() -> UserError:
    return UserError(
        "tokenize",
        "a worker was killed, as happens where memory is short",
        "give the node more memory, or fewer cpus; a rerun goes on where it was",
    )


def _serve(
    connection: Connection,
    encoder: DocumentEncoder | None,
    tokenizer: Path,
    recipe: TokenizeRecipe,
) -> None:
    """Make what is asked for until the parent ends; its interruption is its matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fast.use_threads(1)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    chunks = ChunkEncoder(encoder or DocumentEncoder(tokenizer, recipe))
    while True:
        task, prefix = connection.recv()
        try:
            found: Made | Exception = _made(chunks, task, prefix)
        except Exception as error:
            found = error
        connection.send(found)


def _made(chunks: ChunkEncoder, task: Task, prefix: Path) -> Made:
    tokens = Apart(prefix, chunks.encoder.vocab_size)
    try:
        made = chunks.make(task, tokens)
    finally:
        tokens.close()
    made.tokens = prefix
    return made


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # else a worker outlives a killed parent, and holds its lock
