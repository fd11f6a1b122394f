"""Recompute every digest of a node and its ancestors from the bytes that are here.

Nothing that was remembered of a file counts: each is read. Code is compared as DVC's
record has it, as syntax, so that a comment is no change.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from scripts.lib import graph, identity, lineage
from scripts.lib.digest import Memory, md5_file, on_all_cores, same_file
from scripts.lib.errors import UserError
from scripts.lib.lineage import (
    NAMED,
    NOTE,
    Shelf,
    breaks,
    chain,
    inside,
    line_of,
    owner,
    recorded,
)
from scripts.lib.store import LOCK, Record, differences, read_lock

FEW = 3
OF_HUB = (".gitattributes", ".cache/huggingface/")
"""What a folder has besides that was uploaded and downloaded again."""
SEAL = "sha256 of its record: "
"""It shows an accident; against a forger, compare it with what the maker tells."""


@dataclass
class Found:
    """What a verification found, in its order."""

    title: str
    changed: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0

    def change(self, what: str) -> None:
        if what not in self.changed:
            self.changed.append(what)

    def skip(self, what: str) -> None:
        if what not in self.unchecked:
            self.unchecked.append(what)

    def lines(self) -> list[str]:
        """A line for each, and the sum."""
        said = [f"wrong      {what}" for what in self.changed]
        said += [f"unchecked  {what}" for what in self.unchecked]
        said += [f"note       {what}" for what in self.notes]
        read = f"{self.num_files} files, {self.num_bytes / 1e6:,.1f} MB read"
        result = f"{len(self.changed)} wrong" if self.changed else "all as recorded"
        more = f", {len(self.unchecked)} unchecked" if self.unchecked else ""
        return [*said, f"{self.title}: {read}: {result}{more}"]


# ---- an export's folder alone ----------------------------------------------------


def folder(path: Path) -> Found:
    """Check a folder by the record in it."""
    made = lineage.read_folder(path)
    rows = lineage.rows_of(made, str(path / NOTE))
    found = Found(f"{rows[-1]['node']} in {path}")
    rest = {key: value for key, value in made.items() if key != "sha256"}
    text = json.dumps(lineage.sealed(rest), indent=1)
    if text.encode() != (path / NOTE).read_bytes():
        found.change(f"{NOTE}: changed: it is not what its own sha256 says")
    expected = dict(map(line_of, made["md5sums"]))
    names, others = walk(path)
    for name in others:
        found.change(f"{name}: is no plain file: not followed")
    names = [name for name in names if name != NOTE]
    for name in [name for name in names if name.startswith(OF_HUB)]:
        names.remove(name)
        found.skip(f"{name}: the hub's own")
    compare(found, expected, hashed(found, path, names), "")
    by_id = {row["node"]: row for row in rows}
    for row in rows:
        for one in breaks(row, by_id):
            found.change(f"{NOTE}: {row['node']} was made from another {one}")
    found.notes.append(f"the files of its {len(rows) - 1} ancestors are elsewhere")
    found.notes.append(f"{SEAL}{made['sha256']}")
    return found


def walk(path: Path) -> tuple[list[str], list[str]]:
    """Relative names of the plain files below a folder; and of all else but folders."""
    files, others = [], []
    for root, folders, names in os.walk(path):
        for name in (*folders, *names):
            one = Path(root, name)
            relative = one.relative_to(path).as_posix()
            if one.is_symlink() or not (one.is_file() or one.is_dir()):
                others.append(relative)
            elif one.is_file():
                files.append(relative)
    return sorted(files), sorted(others)


def hashed(found: Found, path: Path, names: list[str]) -> dict[str, str]:
    """{name: md5} of files, read now."""
    sums = on_all_cores([partial(md5_file, path / name) for name in names])
    found.num_files += len(names)
    found.num_bytes += sum((path / name).stat().st_size for name in names)
    return dict(zip(names, sums, strict=True))


def compare(
    found: Found, expected: dict[str, str], now: dict[str, str], prefix: str
) -> None:
    """Note each file below `prefix` that differs, lacks, or is there too many."""
    verb = {(True, False): "missing", (False, True): "not recorded"}
    for name in sorted(expected.keys() | now.keys()):
        if expected.get(name) != now.get(name):
            what = verb.get((name in expected, name in now), "changed")
            found.change(f"{'/'.join(filter(None, (prefix, name)))}: {what}")


# ---- a node in its project -------------------------------------------------------


def node(id: str, config: Path) -> Found:
    """Check a node and all its ancestors."""
    entries = read_lock()
    ids = chain(entries, id)
    found = Found(f"{id} and {len(ids) - 1} ancestors")
    check = _Check(found, Shelf(), config)
    records = {one: recorded(entries, one) for one in ids}
    for one in ids:
        check.links(one, records)
        for path, md5 in records[one].outs.items():
            check.bytes_of(path, md5, one)
        check.sources(one, records[one])
        check.note(one, records[one])
    for one, paths in check.absent.items():
        what = f"{', '.join(paths)}: neither here nor in DVC's cache: dvc pull "
        if one == id:
            found.change(f"{id}: {what}{id.replace('/', '-')}")
        else:
            found.skip(f"{one}: {what}{one.replace('/', '-')}")
    check.planned(records)
    return found


class _Check:
    """One verification, and what it has read already."""

    def __init__(self, found: Found, shelf: Shelf, config: Path) -> None:
        self.found, self.shelf, self.config = found, shelf, config
        self.seen: set[tuple[str, str]] = set()
        self.absent: dict[str, list[str]] = {}
        self.locks: dict[tuple[str, str], list[str]] = {}

    def links(self, id: str, records: dict[str, Record]) -> None:
        """A node's inputs must be what its parents' records say."""
        for path, md5 in records[id].deps.items():
            parent = owner(path)
            if parent and records[parent].outs.get(path) != md5:
                self.found.change(f"{LOCK}: {id} was made from another {path}")

    def bytes_of(self, path: str, md5: str, id: str) -> None:
        """Compare a recorded file or folder, here and in DVC's cache."""
        if (path, md5) in self.seen:
            return
        self.seen.add((path, md5))
        here = Path(path)
        names, others = walk(here) if here.is_dir() else ([""] * here.is_file(), [])
        linked = [name for name in others if (here / name).is_file()]
        for name in sorted(set(others) - set(linked)) if owner(path) else []:
            self.found.change(f"{path}/{name}: is no plain file")
        now = hashed(self.found, here, [*names, *linked])
        expected = self.expected(path, md5)
        if expected is None and not now:
            self.missing(path, id)
        elif expected is None:
            self.whole(here, md5)
        elif here.exists():
            compare(self.found, expected, now, path)
            self.cached(path, expected, needed=False)
        elif not self.cached(path, expected, needed=True):
            self.missing(path, id)

    def expected(self, path: str, md5: str) -> dict[str, str] | None:
        """{name: md5} as recorded; None for a folder whose listing is not here."""
        if not md5.endswith(".dir"):
            return {"": md5}
        cached = self.shelf.cache.object(md5)
        listed = self.shelf.listing(md5)
        if listed is None and cached.is_file():
            self.found.change(f"{cached}: changed: it lists {path}")
        return listed

    def whole(self, here: Path, md5: str) -> None:
        """Compare a folder of which no listing is here."""
        if Memory(Path(os.devnull)).recorded_as(here) != md5:
            self.found.change(f"{here}: changed; which file, no listing here tells")

    def cached(self, path: str, expected: dict[str, str], needed: bool) -> bool:
        """Compare what DVC's cache has of it; whether that is all."""
        objects = {n: self.shelf.cache.object(md5) for n, md5 in expected.items()}
        there = {n: o for n, o in objects.items() if o.is_file()}
        if needed and len(there) < len(objects):
            return False
        own = {n: o for n, o in there.items() if not same_file(o, Path(path, n))}
        sums = on_all_cores([partial(md5_file, one) for one in own.values()])
        for (name, one), md5 in zip(own.items(), sums, strict=True):
            if md5 != expected[name]:
                of = f"{path}/{name}" if name else path
                self.found.change(f"{one}: changed: it is {of} in DVC's cache")
        self.found.num_files += len(own)
        self.found.num_bytes += sum(one.stat().st_size for one in own.values())
        return True

    def missing(self, path: str, id: str) -> None:
        """What is nowhere here: an artifact may be elsewhere, a file was deleted."""
        if owner(path) == id:
            self.absent.setdefault(id, []).append(path.removeprefix(f"artifacts/{id}/"))
        elif Path(f"{path}.dvc").exists():
            self.found.skip(f"{path}: not here: dvc pull {path}.dvc")
        else:
            self.found.change(f"{path}: missing: {id} read it")

    def sources(self, id: str, record: Record) -> None:
        """Compare the project's own files, and the code, with what was read."""
        for path, md5 in record.deps.items():
            if owner(path) is None:
                self.bytes_of(path, md5, id)
        for file, digest in record.params.get("code", {}).items():
            try:
                now = identity.as_now({inside(file): digest})[file]
            except (UserError, UnicodeDecodeError, ValueError):
                now = "not Python"
            if now != digest:
                state = "changed" if now else "missing"
                self.found.change(f"{file}: {state} since {id} was made")
        sources = record.params.get("recipe", {}).get("sources")
        for source, found in sources.items() if isinstance(sources, dict) else ():
            if isinstance(found, dict) and found.get("revision"):
                at = f"{found.get('hf')} at {found['revision']}"
                self.found.skip(f"{source}: on the hub: {at}")

    def note(self, id: str, record: Record) -> None:
        """Compare the record with what the artifact says of itself, and the locks."""
        made = self.shelf.data(record.outs, f"artifacts/{id}/{NOTE}")
        if made is None:  # said already, with the artifact
            return
        of = {"node": id, "inputs": record.deps, "packages": {}, **record.params}
        for key in NAMED:
            if made.get(key) != of.get(key):
                self.found.change(f"{LOCK}: {key} of {id} are not its {NOTE}'s")
        if "sha256" in made:
            self.found.notes.append(f"{id}: sha256 {made['sha256']}")
        locks = made.get("environment")
        for lock, digest in locks.items() if isinstance(locks, dict) else ():
            path = Path(inside(lock))
            text = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(text).hexdigest() != digest:
                self.locks.setdefault((lock, str(digest)), []).append(id)

    def planned(self, records: dict[str, Record]) -> None:
        """Compare settings and versions with the config's, as it is now."""
        try:
            nodes = graph.build(self.config).nodes
        except UserError as error:
            self.found.skip(f"settings: {error.where}: {error.what}")
            nodes = {}
        for id, record in records.items():
            if id not in nodes:
                if nodes:
                    self.found.skip(f"settings of {id}: not in {self.config}")
                continue
            now: Any = nodes[id].params
            for key in ("recipe", "packages"):
                at = record.params.get(key, {})
                for what in differences(at, now.get(key, {})):
                    where = self.config if key == "recipe" else "package"
                    self.found.change(f"{where} {id}: {what} since it was made")
        for (lock, _), ids in self.locks.items():
            what = f"{lock}: another since {_few(ids)} was made"
            self.found.notes.append(f"{what}; of its versions, those used count")


def _few(ids: list[str]) -> str:
    more = f" and {len(ids) - FEW} more" if len(ids) > FEW else ""
    return ", ".join(ids[:FEW]) + more
