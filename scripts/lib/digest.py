"""Digests as DVC records them, remembered by inode, size and time of change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from typing import Any

SHARED_CONFIGS = ("/etc/xdg/dvc/config", "~/.config/dvc/config")
"""DVC's own files for `--system` and `--global`."""

Signature = tuple[int, int, int]


def md5_file(path: Path) -> str:
    """The md5 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def on_all_cores(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each job returns; they run in threads. After an error no more are begun."""
    if not jobs:
        return []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: job(), jobs))


def tree_digest(md5_of: dict[str, str]) -> str:
    """DVC's digest of a folder, from {relative path: md5}.

    The form is that of `dvc_data.hashfile.tree.Tree`.
    """
    listing = [{"md5": md5_of[name], "relpath": name} for name in sorted(md5_of)]
    return hashlib.md5(json.dumps(listing).encode()).hexdigest() + ".dir"


def files_in(folder: Path) -> list[str]:
    """Relative paths of the files below `folder`, but what .dvcignore names."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f != "__pycache__"]
        names = [n for n in names if not n.endswith(".pyc")]
        found += [os.path.relpath(os.path.join(root, n), folder) for n in names]
    return sorted(Path(n).as_posix() for n in found)


def same_file(one: Path, other: Path) -> bool:
    """Whether two names are of one file, which is there."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def write_atomic(path: Path, text: str) -> None:
    """Write by rename, so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


class Kept:
    """What was made of some bytes before, by their digest, kept in one JSON file.

    All of it is made anew where the code of `maker`, or `version`, is another.
    """

    def __init__(self, store: Path, maker: Path, version: str = "") -> None:
        self.store, self.maker, self.version = store, maker, version
        self.by, self.read_from = "", Path()
        self.known: dict[str, list[Any]] = {}
        self.changed = False

    def get(self, name: str, source: bytes) -> Any:
        """What was made of `source` under this name; None if that is not known."""
        self._read()
        digest, made = self.known.get(name, ("", None))
        return made if digest == hashlib.sha256(source).hexdigest() else None

    def put(self, name: str, source: bytes, made: Any) -> None:
        """Keep what was made, if JSON gives it back as it is."""
        self._read()
        try:
            same = json.loads(json.dumps(made)) == made
        except (TypeError, ValueError):
            same = False
        if same:
            self.known[name] = [hashlib.sha256(source).hexdigest(), made]
            self.changed = True

    def save(self) -> None:
        """Write what is new."""
        if self.changed:
            write_atomic(
                self.read_from, json.dumps({"by": self.by, "known": self.known})
            )
            self.changed = False

    def _read(self) -> None:
        if self.read_from == self.store.absolute():  # else another working folder
            return
        self.read_from, self.changed = self.store.absolute(), False
        self.by = f"{md5_file(self.maker)} {self.version}"
        self.known = {}
        try:
            stored = json.loads(self.store.read_text())
            if stored["by"] == self.by:
                self.known = stored["known"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass


class Memory:
    """Digests of files read before, kept in one JSON file."""

    def __init__(self, store: Path) -> None:
        self.store = store
        try:
            stored = json.loads(store.read_text())
        except (FileNotFoundError, ValueError):
            stored = {}
        self.known: dict[str, tuple[Signature, str]] = {
            name: ((s[0], s[1], s[2]), md5) for name, (s, md5) in stored.items()
        }
        self.changed = False

    @staticmethod
    def signature(path: Path) -> Signature:
        info = os.stat(path)
        return info.st_ino, info.st_size, info.st_mtime_ns

    def remember(self, path: Path, md5: str) -> None:
        """Take `md5` as the file's digest until the file changes."""
        self.known[str(path)] = self.signature(path), md5
        self.changed = True

    def file(self, path: Path) -> str:
        """A file's md5, read again only if its inode, size or time changed."""
        md5 = self.seen(path)
        if md5 is None:
            md5 = md5_file(path)
            self.remember(path, md5)
        return md5

    def seen(self, path: Path) -> str | None:
        """A file's md5 if it was read before and is as it was."""
        known = self.known.get(str(path))
        return known[1] if known and known[0] == self.signature(path) else None

    def files(self, folder: Path) -> dict[str, str]:
        """{relative path: md5} of a folder; what is new is read on all cores."""
        names = files_in(folder)
        found = {name: self.seen(folder / name) for name in names}
        new = [name for name, md5 in found.items() if md5 is None]
        sums = on_all_cores([partial(self.file, folder / name) for name in new])
        found |= dict(zip(new, sums, strict=True))
        return {name: str(md5) for name, md5 in found.items()}

    def recorded_as(self, path: Path) -> str | None:
        """What DVC would record for a file or folder; None if it is not there."""
        if path.is_dir():
            return tree_digest(self.files(path))
        return self.file(path) if path.is_file() else None

    def save(self) -> None:
        if self.changed:
            write_atomic(self.store, json.dumps(self.known))
            self.changed = False


class Cache:
    """DVC's local cache of files, as it lies on disk."""

    def __init__(self) -> None:
        folder = Path(".dvc/cache")
        ours = [Path(".dvc", name) for name in ("config", "config.local")]
        for path in (*map(Path, SHARED_CONFIGS), *ours):
            config = ConfigParser(interpolation=None)
            config.read(path.expanduser())
            if given := config.get("cache", "dir", fallback=None):
                folder = Path(".dvc", given)
        self.folder = folder / "files" / "md5"

    def object(self, md5: str) -> Path:
        return self.folder / md5[:2] / md5[2:]

    def listing(self, md5: str) -> dict[str, str] | None:
        """{relative path: md5} of a recorded folder; None if that is not cached."""
        try:
            entries = json.loads(self.object(md5).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return {entry["relpath"]: entry["md5"] for entry in entries}

    def holds(self, md5: str) -> bool:
        """Whether the file, or every file of the folder, is here."""
        if not md5.endswith(".dir"):
            return self.object(md5).is_file()
        listed = self.listing(md5)
        return listed is not None and all(
            self.object(one).is_file() for one in listed.values()
        )
