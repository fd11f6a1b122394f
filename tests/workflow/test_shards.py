"""Several jobs for one node: the bytes of one, and nothing runs that need not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.workflow.conftest import Project, make_project
from tests.workflow.test_reruns import assert_current, assert_same_as_fresh, said

CONFIG = """\
data:
  corpus: {files: data/corpus-*.jsonl}
  chat: {files: data/chat.jsonl}
tokenizer:
  tiny:
    data: chat
    vocab_size: 300
    chat_template: config/models/tiny/chat_template.jinja
tokenize:
  corpus: {tokenizer: tiny, data: corpus}
placement:
  tokenize: {default: {jobs: 3}}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A node of five files, made by three jobs and its own."""
    project = make_project(tmp_path_factory.mktemp("shards") / "project", CONFIG)
    rows = project.rows("data/corpus.jsonl")
    for i in range(5):
        project.write_rows(f"data/corpus-{i}.jsonl", rows[i::5])
    os.remove(project.path / "data/corpus.jsonl")
    assert "(in 3 jobs)" in project.reason("tokenize/corpus")
    project.transcript = project.snakemake("tokenize")
    return project


@pytest.fixture
def project(shared: Project, tmp_path: Path) -> Project:
    copy = tmp_path / "project"
    subprocess.run(["cp", "-a", str(shared.path), str(copy)], check=True)
    return Project(copy)


def begun(text: str) -> set[str]:
    """The jobs beside the node's own whose script ran."""
    return set(re.findall(r"(?m)^tokenize/corpus-(\d)of\d  (?:starts|resumes)", text))


def ended(project: Project, since: float) -> set[str]:
    """The jobs beside the node's own that left word of what they made."""
    files = project.path.glob("state/tokenize/corpus-?of3.json")
    return {one.name[7] for one in files if one.stat().st_mtime > since}


def new_files(project: Project, jobs: int = 3) -> list[int]:
    """How many chunks each job's last run had to encode."""
    logs = [f"logs/tokenize/corpus-{i + 1}of{jobs}.log" for i in range(jobs)]
    found = [(project.path / log).read_text() for log in logs]
    return [int(re.findall(r"(\d+) of \d+ chunks are new", log)[-1]) for log in found]


def test_several_jobs_give_the_bytes_of_one(shared: Project, tmp_path: Path):
    assert begun(shared.transcript) == {"1", "2", "3"}
    assert sum(new_files(shared)) == 5 and min(new_files(shared)) > 0
    assert said(shared, "5 of 5 chunks as before, their tokens copied")
    assert_same_as_fresh(shared, tmp_path)
    assert_current(shared)
    assert "corpus-" not in shared.sh("snakemake", "-n", "tokenize")
    assert not [*shared.path.glob("work/tokenize/*/*of*/out")]


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_another_number_of_jobs_reruns_nothing(project: Project, jobs: int):
    project.edit("config/config.yaml", "jobs: 3", f"jobs: {jobs}")
    assert_current(project)
    assert "done" not in project.snakemake("tokenize").replace("[done]", "")


def test_a_changed_file_is_encoded_by_one_job_alone(project: Project, tmp_path: Path):
    rows = project.rows("data/corpus-1.jsonl")
    project.write_rows("data/corpus-1.jsonl", [*rows, "no row"])
    project.snakemake("tokenize", check=False)
    assert project.code and "corpus-1.jsonl:" in project.output
    project.write_rows("data/corpus-1.jsonl", [*rows, rows[0]])
    project.snakemake("tokenize")
    assert sorted(new_files(project)) == [0, 0, 1]
    assert_same_as_fresh(project, tmp_path)
    assert_current(project)


def test_jobs_share_one_large_file(project: Project, tmp_path: Path):
    rows = project.rows("data/corpus-0.jsonl")
    for i in range(5):
        os.remove(project.path / f"data/corpus-{i}.jsonl")
    project.write_rows("data/corpus-0.jsonl", rows)
    path = project.path / "data/corpus-0.jsonl"
    content = path.read_bytes()
    path.write_bytes(content * (36_000_000 // len(content)))
    project.snakemake("tokenize")
    assert new_files(project) == [1, 1, 1]
    assert said(project, "3 of 3 chunks as before")
    assert_same_as_fresh(project, tmp_path)
    assert_current(project)


def test_killed_jobs_go_on_and_finished_ones_are_kept(project: Project, tmp_path: Path):
    for i in range(5):
        rows = project.rows(f"data/corpus-{i}.jsonl")
        project.write_rows(f"data/corpus-{i}.jsonl", rows[1:])
    since = time.time()
    run = subprocess.Popen(
        ["snakemake", "--profile", "local", "--cores", "1", "tokenize"],
        cwd=project.path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (kept := ended(project, since)):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert begun(project.snakemake("tokenize")) == {"1", "2", "3"} - kept
    assert sum(new_files(project)) == 5
    assert said(project, "5 of 5 chunks as before")
    assert_same_as_fresh(project, tmp_path)
    assert_current(project)


def test_an_equal_tokenizer_starts_none(project: Project):
    with open(project.path / "data/chat.jsonl", "a") as file:
        file.write("\n")
    assert project.planned("tokenize") == {"tokenizer/tiny", "tokenize/corpus"}
    assert project.build("tokenize") == {"tokenizer/tiny": "built"}
    assert not begun(project.output)
    assert_current(project)


def test_what_dvc_has_is_restored_and_not_made(project: Project):
    setting = "special_tokens: keep, "
    project.edit(
        "config/config.yaml", "{tokenizer: tiny", f"{{{setting}tokenizer: tiny"
    )
    project.edit("config/config.yaml", "keep", "escape")
    assert project.build("tokenize") == {"tokenize/corpus": "built"}
    assert begun(project.output) == {"1", "2", "3"}
    project.edit("config/config.yaml", "escape", "keep")
    assert project.build("tokenize") == {"tokenize/corpus": "restored"}
    assert not begun(project.output)
    shutil.rmtree(project.path / "artifacts/tokenize")
    assert project.build("tokenize") == {"tokenize/corpus": "restored"}
    assert "corpus-" not in project.output
    assert_current(project)


def test_dvc_alone_makes_it_by_one_job(project: Project, tmp_path: Path):
    project.write_rows("data/corpus-9.jsonl", project.rows("data/corpus-1.jsonl"))
    project.sh("python", "-m", "scripts.lib.plan")
    project.sh("dvc", "repro", "tokenize-corpus")
    assert "corpus-1of3" not in project.output
    assert_same_as_fresh(project, tmp_path)
    assert_current(project)
