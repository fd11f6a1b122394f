"""A project of a few quick nodes, built once by the real tools; each test takes a copy.

The rows are the generator's, laid down as a user's own files, so that tests can
edit them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]

CONFIG = """\
data:
  corpus: {files: data/corpus.jsonl}
  chat: {files: data/chat.jsonl}
  sums: {files: data/sums.jsonl}
tokenizer:
  tiny:
    data: corpus
    vocab_size: 300
    chat_template: config/models/tiny/chat_template.jinja
tokenize:
  corpus: {tokenizer: tiny, data: corpus}
pack:
  chat: {tokenizer: tiny, data: chat, sequence_length: 128}
prompts:
  sums: {tokenizer: tiny, data: sums, max_prompt_tokens: 64}
pretrain:
  base: {model: tiny, data: corpus, sequence_length: 64, steps: 4, batch_size: 8, lr: 3.0e-3}
sft:
  instruct: {from: base, data: chat, steps: 4, batch_size: 8, lr: 3.0e-3}
grpo:
  reasoner:
    from: instruct
    data: sums
    steps: 2
    batch_size: 8
    num_generations: 4
    max_completion_tokens: 4
    lr: 1.0e-5
    weight_decay: 0.1
export:
  nano: {from: reasoner}
eval:
  sums:
    from: [base, nano]
    limit: 20
    tasks:
      arithmetic: {file: config/tasks/arithmetic.yaml, data: sums}
report:
  main: {}
placement:
  default: {default: {cpus: 1, memory_gb: 1}}
"""

TRAINING = {"pretrain/base", "sft/instruct", "grpo/reasoner"}


class Project:
    """A folder with the pipeline in it, and what its last run did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = ""
        self.code = 0
        self.first: dict[str, str] = {}
        self.transcript = ""

    def sh(self, *words: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(
            words,
            cwd=self.path,
            env={**os.environ, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1200,
        )
        self.output, self.code = done.stdout, done.returncode
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.stdout}")
        return done.stdout

    def snakemake(self, *words: str, check: bool = True, **env: str) -> str:
        return self.sh("snakemake", "--profile", "local", *words, check=check, **env)

    def build(self, *words: str, check: bool = True, **env: str) -> dict[str, str]:
        """Run Snakemake; {node: built|restored} of what its jobs did."""
        text = self.snakemake(*(words or ("export",)), check=check, **env)
        done = re.findall(r"(?m)^(\w+/\w+)  (done|restored)", text)
        return {node: {"done": "built"}.get(how, how) for node, how in done}

    def planned(self, *words: str, **env: str) -> set[str]:
        """The nodes `snakemake -n` would run or may run."""
        targets = words or ("export",)
        text = self.sh("snakemake", "-n", "-q", "host", "--", *targets, **env)
        return set(re.findall(r"(?m)^checkpoint (\w+/\w+):", text))

    def reason(self, node: str) -> str:
        """The plan's line on a node."""
        text = self.sh(sys.executable, "-m", "scripts.lib.plan")
        (line,) = re.findall(rf"(?m)^(?:may run|\w+) +{node}(?: .*)?$", text)
        return line

    def dvc_clean(self) -> bool:
        return "up to date" in self.sh("dvc", "status")

    def dvc_would_run(self) -> set[str]:
        """The nodes DVC would run; with parts not pulled it stops at the first."""
        text = self.sh("dvc", "repro", "--dry", "--allow-missing", check=False)
        named = re.findall(r"(?:Running stage|failed to reproduce) '([^']+)'", text)
        assert named or not self.code, text
        return {name.replace("-", "/") for name in named}

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.path / file
        text = path.read_text()
        assert old in text, f"{old!r} is not in {file}"
        path.write_text(text.replace(old, new, 1))

    def rows(self, file: str) -> list[str]:
        return (self.path / file).read_text().splitlines()

    def write_rows(self, file: str, rows: list[str]) -> None:
        (self.path / file).write_text("\n".join(rows) + "\n")

    def start_grpo(self) -> subprocess.Popen[str]:
        """Start a build and return when its GRPO script has begun."""
        recipes = "work/grpo/*/recipe.yaml"
        before = len([*self.path.glob(recipes)])
        run = subprocess.Popen(
            ["snakemake", "--profile", "local", "grpo"],
            cwd=self.path,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while len([*self.path.glob(recipes)]) == before:
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.1)
        return run

    def commit(self) -> None:
        self.sh("git", "add", "-A")
        self.sh("git", "commit", "-qm", "state", "--allow-empty")

    def lock(self) -> str:
        return (self.path / "dvc.lock").read_text()


def copy_files(source: Path, path: Path) -> None:
    """A repository's files, as git has them or would, into a new folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=source,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        skipped = name.startswith("tests/") or name == "dvc.lock"
        if (source / name).is_file() and not skipped:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, path / name)


def make_project(path: Path, config: str = CONFIG) -> Project:
    """The pipeline in a new folder, with a quick config and data to edit."""
    copy_files(ROOT, path)
    (path / "config/config.yaml").write_text(config)
    project = Project(path)
    for kind, file, count in (
        ("documents", "corpus", 400),
        ("chats", "chat", 300),
        ("prompts", "sums", 60),
    ):
        recipe = path / f"{kind}.yaml"
        recipe.write_text(json.dumps({"kind": kind, "count": count, "max_operand": 9}))
        project.sh(
            sys.executable, "-m", "scripts.data.generate",
            "--recipe", str(recipe), "--out", str(path / f"made/{kind}"),
        )  # fmt: skip
        (path / "data").mkdir(exist_ok=True)
        shutil.copy(path / f"made/{kind}/rows.jsonl", path / f"data/{file}.jsonl")
        recipe.unlink()
    shutil.rmtree(path / "made")
    project.sh("git", "init", "-q", "-b", "main")
    project.sh("git", "config", "user.name", "a")
    project.sh("git", "config", "user.email", "a@b.c")
    return project


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with everything built, committed, and pushed to a remote."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all the test processes
    base, first = shared / "built", shared / "built.json"
    with FileLock(shared / "built.lock"):
        if not first.exists():
            base.mkdir()
            project = make_project(base / "project")
            project.sh("dvc", "remote", "add", "-d", "store", str(base / "remote"))
            done = project.build()
            project.commit()
            project.sh("dvc", "push", "-q")
            first.write_text(json.dumps(done))
    project = Project(base / "project")
    project.first = json.loads(first.read_text())
    return project


@pytest.fixture
def project(built: Project, tmp_path: Path) -> Project:
    """A copy of the built project, with its caches, that a test may change."""
    copy = tmp_path / "project"
    subprocess.run(["cp", "-a", str(built.path), str(copy)], check=True)
    return Project(copy)


@pytest.fixture
def clone(built: Project, tmp_path: Path) -> Project:
    """A fresh clone, with nothing pulled."""
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(built.path), str(path)], check=True)
    return Project(path)
