"""Digests are DVC's own, and are never taken from a file that changed."""

from __future__ import annotations

import os
from pathlib import Path

from dvc_data.hashfile.build import build
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_objects.fs.local import LocalFileSystem

from scripts.lib.digest import Kept, Memory


def test_a_folders_digest_is_dvcs(tmp_path: Path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "b" / "ü.bin").write_bytes(bytes(range(256)))
    (folder / "b-c").write_text("sorts between")
    fs = LocalFileSystem()
    _, _, tree = build(
        LocalHashFileDB(fs, str(tmp_path / "odb")), str(folder), fs, "md5"
    )
    assert Memory(tmp_path / "m").recorded_as(folder) == tree.hash_info.value


def test_a_changed_file_is_read_again_even_if_its_time_is_set_back(tmp_path: Path):
    memory, path = Memory(tmp_path / "m"), tmp_path / "f"
    path.write_text("one")
    before = memory.recorded_as(path)
    info = path.stat()
    path.write_text("other")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert memory.recorded_as(path) != before


def test_memory_survives_in_its_file(tmp_path: Path):
    path = tmp_path / "f"
    path.write_text("one")
    memory = Memory(tmp_path / "m")
    digest = memory.recorded_as(path)
    memory.save()
    assert Memory(tmp_path / "m").known[str(path)][1] == digest


def test_what_is_kept_is_forgotten_with_other_bytes_and_another_maker(tmp_path: Path):
    store, maker = tmp_path / "kept.json", tmp_path / "maker.py"
    maker.write_text("one")
    kept = Kept(store, maker)
    kept.put("a", b"bytes", {"made": [1, 2.5, None]})
    kept.put("b", b"bytes", {1: "a key JSON would make text"})
    kept.put("c", b"bytes", {"a set": {1}})
    kept.save()
    again = Kept(store, maker)
    assert again.get("a", b"bytes") == {"made": [1, 2.5, None]}
    assert again.get("a", b"others") is None
    assert again.get("b", b"bytes") is None and again.get("c", b"bytes") is None
    maker.write_text("two")
    assert Kept(store, maker).get("a", b"bytes") is None
    store.write_text("{half a")
    assert Kept(store, maker).get("a", b"bytes") is None
