"""The table of nodes: from files and Slurm's words, without writing anything."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from scripts.lib import graph, slurm, status
from scripts.lib.errors import UserError
from scripts.lib.slurm import SlurmError
from scripts.lib.store import GRAPH, PLAN_LOCK, RUN_LOCK, STATE

CONFIG = Path("config/config.yaml")

SQUEUE = """\
18|COMPLETED|rule_tokenizer/tiny|n1|None|0:01|30:00
19|CANCELLED|rule_pretrain/base|n1|None|0:33|30:00
20|RUNNING|rule_pretrain/base|n[1-2]|None|0:18|30:00
21|PENDING|rule_pack/chat||Resources|0:00|30:00
22|OUT_OF_MEMORY|rule_tokenize/corpus|n2|OutOfMemory|1:10|30:00
23|PENDING|rule_sft/old||Priority|0:00|30:00
"""
"""Recorded from Slurm 22.05.8, the nodes' names put in."""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy where nothing was built yet."""
    for name in ("config", "envs", "scripts"):
        shutil.copytree(name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    says(monkeypatch, SQUEUE)


def says(monkeypatch: pytest.MonkeyPatch, said: str | UserError) -> None:
    def ask(*_: str) -> str:
        if isinstance(said, UserError):
            raise said
        return said

    monkeypatch.setattr(slurm, "ask", ask)


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert status.main([*flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    return {row["node"]: row for row in answer["nodes"]} | {"": answer}


def work(node: str, **progress: float) -> None:
    folder = Path("work", f"{node}-0123456789ab")
    folder.mkdir(parents=True)
    (folder / "log.txt").touch()
    (folder / "progress.json").write_text(json.dumps(progress))
    (folder / "seconds.json").write_text("75.2")
    link = Path("logs", f"{node}.log")
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(folder / "log.txt", link.parent))


@pytest.fixture
def holds() -> Iterator[Any]:
    files: list[IO[str]] = []

    def hold(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append(open(path, "w"))
        fcntl.flock(files[-1], fcntl.LOCK_EX)

    yield hold
    for file in files:
        file.close()


def files() -> dict[Path, int]:
    return {
        p: p.lstat().st_mtime_ns
        for p in Path().rglob("*")
        if "__pycache__" not in str(p)
    }


def test_each_node_shows_its_job_state_and_progress(capsys: Any):
    work("pretrain/base", step=120, steps=700, loss=0.43125, lr=0.001)
    found = shown(capsys)
    base = found["pretrain/base"]
    assert (base["job"], base["machines"], base["state"]) == ("20", "n[1-2]", "running")
    assert (base["time"], base["step"]) == ("0:18 of 30:00", "120 of 700")
    assert (base["measure"], base["log"]) == ("loss 0.4313", "logs/pretrain/base.log")
    assert (found["pack/chat"]["state"], found["pack/chat"]["note"]) == (
        "pending",
        "Resources",
    )
    corpus = found["tokenize/corpus"]
    assert (corpus["state"], corpus["note"]) == ("failed", "out of memory")
    assert (corpus["job"], corpus["time"]) == ("22", "1:10")
    assert found["generate/chat"]["state"] == "ready"
    assert found["sft/instruct"]["state"] == "waiting"
    assert found["sft/instruct"]["note"].startswith("for generate/")
    assert found["sft/old"]["note"] == "no such node in the config any more"
    assert found[""]["counts"]["pending"] == 2 and not found[""]["problem"]


def test_a_failed_jobs_log_is_slurms(capsys: Any):
    work("tokenize/corpus", step=1, steps=4)
    log = Path("logs/slurm/rule_tokenize/corpus/22.log")
    log.parent.mkdir(parents=True)
    log.touch()
    row = shown(capsys)["tokenize/corpus"]
    assert (row["log"], row["step"]) == (str(log), "25%")


def test_the_table_is_aligned_and_ends_with_the_counts(capsys: Any):
    work("pretrain/base", step=120, steps=700, loss=0.43125)
    assert status.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["node", "job", "on", "state", "time", "step", "log"]
    (base,) = [line for line in lines if line.startswith("pretrain/base")]
    assert base.index("20") == lines[0].index("job")
    assert base.split("  ")[-1] == "logs/pretrain/base.log"
    assert lines[-1] == "1 running, 2 pending, 1 failed, 4 ready, 8 waiting"


def test_slurm_that_does_not_answer_is_said_and_the_rest_shown(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    says(monkeypatch, SlurmError("squeue", "no answer in 60 s"))
    assert status.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Slurm: no answer in 60 s; its jobs are not shown" in lines
    assert lines[-1] == "4 ready, 11 waiting"


def test_without_slurm_a_local_build_is_shown(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, holds: Any
):
    says(monkeypatch, UserError("squeue", "not found"))
    work("pretrain/base", step=120, steps=700, reward=2.0)
    holds(STATE / "pretrain/base.lock")
    row = shown(capsys)["pretrain/base"]
    assert (row["state"], row["step"], row["measure"]) == (
        "running",
        "120 of 700",
        "reward 2",
    )
    assert (row["time"], row["job"]) == ("0:01:15", "")


def test_looking_writes_nothing_and_takes_no_lock_from_a_run(capsys: Any, holds: Any):
    GRAPH.parent.mkdir(parents=True)
    planned = graph.build(CONFIG)
    GRAPH.write_text(planned.to_json())
    PLAN_LOCK.touch()
    holds(RUN_LOCK)
    CONFIG.write_text(CONFIG.read_text().replace("  chat: {tok", "  chats: {tok"))
    before = files()
    found = shown(capsys)
    assert files() == before
    assert "pack/chat" in found, "what the run that is active planned"


@pytest.mark.parametrize("lock", [RUN_LOCK, PLAN_LOCK])
def test_a_run_is_active_while_it_plans_or_builds(holds: Any, lock: Path):
    assert not status.run_is_active()
    for path in (RUN_LOCK, PLAN_LOCK):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert not status.run_is_active()
    holds(lock)
    assert status.run_is_active()


def test_a_node_that_several_jobs_make_is_one_line(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    two = "\n  two: {kind: documents, count: 9}\n"
    text = CONFIG.read_text().replace("\n  corpus: {kind", f"{two}  corpus: {{kind", 1)
    text = text.replace(
        "tokenizer: tiny, data: corpus", "tokenizer: tiny, data: [corpus, two]"
    )
    CONFIG.write_text(text.rstrip() + "\n  tokenize: {default: {jobs: 8}}\n")
    says(monkeypatch, """\
30|COMPLETED|rule_tokenize/corpus-1of2|n1|None|0:09|30:00
31|RUNNING|rule_tokenize/corpus-2of2|n2|None|0:10|30:00
32|PENDING|rule_tokenize/corpus-1of4||Priority|0:00|30:00
""")  # fmt: skip
    Path("state/tokenize").mkdir(parents=True)
    Path("state/tokenize/corpus-1of2.json").write_text("{}")
    found = shown(capsys)
    row = found["tokenize/corpus"]
    assert (row["job"], row["machines"], row["state"]) == ("31", "n2", "running")
    assert (row["time"], row["step"]) == ("0:10 of 30:00", "1 of 2 jobs")
    assert "no such node" in found["tokenize/corpus-1of4"]["note"]
    says(monkeypatch, "31|FAILED|rule_tokenize/corpus-2of2|n2|None|0:10|30:00\n")
    log = Path("logs/slurm/rule_tokenize/corpus-2of2/31.log")
    log.parent.mkdir(parents=True)
    log.touch()
    row = shown(capsys)["tokenize/corpus"]
    assert (row["state"], row["log"]) == ("failed", str(log))
