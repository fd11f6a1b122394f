"""Publishing copies nothing, loses nothing, and goes on where it was ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.workflow.conftest import Project

UNTESTED = "NOT TESTED: this machine does not let us "
NODE = "prompts/sums"
FOLDER = f"artifacts/{NODE}"

AT_A_MOMENT = """\
import os, sys

def look(event, args):
    if event == WHEN and sys.argv[0].endswith("lib/run.py"):
        paths = [os.fspath(a) for a in args if isinstance(a, (str, os.PathLike))]
        if any(path.endswith(WHERE) for path in paths) and not happened:
            happened.append(event)
            os.system(os.environ["DO"])

happened = []
WHEN, WHERE = os.environ.get("AT", " ").split(" ")
sys.addaudithook(look)
"""
"""Loaded by every Python as it starts: a node's job runs a command just before this."""

MOMENTS = {
    "it is hashed": "open out/data/train.jsonl",
    "it is moved into place": f"os.rename {FOLDER}",
    "it goes to the cache": "os.link train.jsonl",
    "the record is written": "open .dvc/tmp/dvc.lock",
    "it is recorded": "os.rename dvc.lock",
    "its manifest is written": f"os.rename state/{NODE}.json",
}


def content(project: Project) -> dict[str, bytes]:
    """What is published, but the provenance, which tells the time."""
    return files_of(project.path / FOLDER / "data")


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@contextmanager
def other_rows(project: Project) -> Iterator[None]:
    """Meanwhile, the node is to be another one, of several blocks of a disk."""
    rows = project.rows("data/sums.jsonl")
    new = [json.dumps({"input": f"{i}+{i}=", "output": str(2 * i)}) for i in range(999)]
    project.write_rows("data/sums.jsonl", new)
    yield
    project.write_rows("data/sums.jsonl", rows)


def run_job(project: Project, at: str = "", do: str = "") -> str:
    """Build the node as Snakemake's job would; at a moment, something happens."""
    hook = project.path.parent / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(AT_A_MOMENT)
    words = sys.executable, "-m", "scripts.lib.run", *NODE.split("/")
    happens = {"PYTHONPATH": str(hook), "AT": MOMENTS[at], "DO": do} if at else {}
    return project.sh(*words, check=False, **happens)


def end_at(project: Project, moment: str) -> None:
    """Run the node's job, and kill it as it comes to a moment."""
    text = run_job(project, moment, "kill -9 $PPID")
    assert project.code == -signal.SIGKILL, text
    assert f"{NODE}  starts" in text or f"{NODE}  resumes" in text


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_publish_killed_hard_goes_on_without_the_script(
    project: Project, moment: str
):
    before = content(project)
    with other_rows(project):
        end_at(project, moment)
        waiting = [*project.path.glob("work/prompts/*/out/data")]
        made = files_of(waiting[0]) if waiting else content(project)
        text = project.snakemake("prompts")
        assert f"{NODE}  starts" not in text and f"{NODE}  resumes" not in text
        assert project.planned("prompts") == set()
        assert content(project) == made != before
        assert not [*(project.path / "artifacts/prompts").glob(".*")]
    assert project.build("prompts") == {NODE: "restored"}
    assert content(project) == before


@pytest.mark.parametrize("moment", [*MOMENTS][1:4])
def test_a_publish_killed_hard_leaves_the_last_good_state(
    project: Project, moment: str
):
    project.sh("dvc", "remote", "remove", "store")
    before = content(project)
    with other_rows(project):
        end_at(project, moment)
    text = project.snakemake("prompts")
    assert f"{NODE}  starts" not in text and f"{NODE}  resumes" not in text
    assert content(project) == before
    assert project.planned() == set() and project.dvc_clean()


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[Path]:
    """Another file system, by mount's words."""
    folder.mkdir()
    done = subprocess.run(["mount", *words, str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(UNTESTED + "mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def moved(project: Project, folder: Path) -> Project:
    """The project on another file system."""
    subprocess.run(["cp", "-a", str(project.path), str(folder)], check=True)
    return Project(folder / project.path.name)


def test_published_files_are_links_to_the_cache_not_copies(built: Project):
    files = [p for p in (built.path / "artifacts").rglob("*") if p.is_file()]
    assert files and all(p.stat().st_nlink >= 2 for p in files if p.stat().st_size)


def test_published_files_shared_with_the_cache_are_read_only(built: Project):
    for path in (built.path / "artifacts").rglob("*"):
        if path.is_file() and path.stat().st_nlink > 1:
            assert path.stat().st_mode & 0o777 == 0o444, path


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_where_files_can_be_cloned_an_edit_never_reaches_the_cache(
    project: Project, tmp_path: Path, kind: str
):
    project.sh("dvc", "remote", "remove", "store")
    disk = tmp_path / "disk.img"
    make = shutil.which(f"mkfs.{kind}")
    if not make:
        pytest.skip(UNTESTED + f"make a disk of {kind}")
    disk.touch()
    os.truncate(disk, 500_000_000)
    subprocess.run([make, "-q", str(disk)], check=True, capture_output=True)
    with mounted(tmp_path / "disk", "-o", "loop", str(disk)) as folder:
        here = moved(project, folder)
        with other_rows(here):
            assert "done" in run_job(here)
            rows = here.path / FOLDER / "data/train.jsonl"
            before = rows.read_bytes()
            assert rows.stat().st_nlink == 1 and is_shared(rows)
            with open(rows, "r+b") as file:
                file.write(b"edited")
            assert "restored" in run_job(here)
            assert rows.read_bytes() == before and is_shared(rows)
            shutil.rmtree(here.path / ".dvc/cache/runs")
            shutil.rmtree(here.path / "work/prompts")
            (here.path / "dvc.lock").write_text(project.lock())
            assert "done" in run_job(here)  # the same bytes again
            assert rows.read_bytes() == before and is_shared(rows)


def is_shared(path: Path) -> bool:
    """Whether the disk holds another file's bytes and this one's once."""
    os.sync()
    text = subprocess.run(
        ["filefrag", "-v", str(path)], text=True, capture_output=True, check=True
    ).stdout
    return "shared" in text


def test_a_full_disk_at_publish_loses_nothing_and_trains_nothing_twice(
    project: Project, tmp_path: Path
):
    words = "-t", "tmpfs", "-o", "size=512k", "none"
    with mounted(tmp_path / "small", *words) as small:
        project.edit("config/config.yaml", "lr: 1.0e-5", "lr: 2.0e-5")
        project.sh("dvc", "config", "--local", "cache.dir", str(small))
        weights = project.path / "artifacts/grpo/reasoner/model/model.safetensors"
        before = weights.read_bytes()
        text = project.snakemake("grpo", check=False)
        assert project.code and "MB free, publishing needs" in text
        assert weights.read_bytes() == before
        project.sh("dvc", "config", "--local", "--unset", "cache.dir")
        text = project.snakemake("grpo")
        assert "grpo/reasoner  done" in text
        assert "step 2 of 2" not in text, "it was trained again"


def test_a_disk_that_is_full_to_the_brim_loses_nothing(
    project: Project, tmp_path: Path
):
    words = "-t", "tmpfs", "-o", "size=500m", "none"
    with mounted(tmp_path / "disk", *words) as folder, other_rows(project):
        here = moved(project, folder)
        end_at(here, "it is moved into place")
        lock, last = here.lock(), content(project)
        with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        text = run_job(here)
        assert here.code == 1 and "error: " in text, text
        assert "No space left" in text and "Traceback" not in text, text
        assert here.lock() == lock
        (folder / "filler").unlink()
        text = run_job(here)
        assert f"{NODE}  done" in text and f"{NODE}  starts" not in text
        assert content(here) != last


@pytest.mark.parametrize(
    ("harm", "mend"),
    [
        ("cat /dev/zero > filler; truncate -s -24K filler", "rm filler"),
        ("chattr +i files/md5/*", "chattr -i files/md5/*"),
    ],
    ids=["fills up", "refuses files"],
)
def test_a_cache_that_takes_no_more_meanwhile_is_not_relied_on(
    project: Project, tmp_path: Path, harm: str, mend: str
):
    lock = project.lock()
    words = "-t", "tmpfs", "-o", "size=4m", "none"
    with mounted(tmp_path / "small", *words) as small, other_rows(project):
        for number in range(256):  # of folders it cannot make, DVC tells by itself
            (small / f"files/md5/{number:02x}").mkdir(parents=True)
        if subprocess.run(f"cd {small}; {harm}; {mend}", shell=True).returncode:
            pytest.skip(UNTESTED + harm)
        project.sh("dvc", "config", "--local", "cache.dir", str(small))
        text = run_job(project, "it is moved into place", f"cd {small}; {harm}")
        assert project.code == 1 and "failed to transfer" in text, text
        assert project.lock() == lock
        subprocess.run(f"cd {small}; {mend}", shell=True, check=True)
        text = run_job(project)
        assert f"{NODE}  done" in text and f"{NODE}  starts" not in text, text
        assert "prompts-sums" not in project.sh("dvc", "status")
