"""What `make clean` frees, and that it frees nothing that is needed."""

from __future__ import annotations

import fcntl
import re
import shutil
import sys

import pytest

from tests.workflow.conftest import Project

STORES = "--kind", "cache", "--kind", "remote", "--refs", "none"


@pytest.fixture
def own(project: Project) -> Project:
    """The project with a remote of its own."""
    remote = project.path.parent / "remote"
    url = project.sh("dvc", "config", "remote.store.url").strip()
    shutil.copytree(project.path / ".dvc" / url, remote)
    project.sh("dvc", "remote", "modify", "store", "url", str(remote))
    project.commit()
    return project


def clean(project: Project, *words: str, check: bool = True) -> str:
    return project.sh(sys.executable, "-m", "scripts.lib.clean", *words, check=check)


def row(text: str, what: str) -> str:
    """The row of a table that tells of this."""
    (line,) = re.findall(rf"(?m)^\w+ .*{re.escape(what)}.*$", text)
    return line


def seeded(project: Project, old: str, new: str) -> dict[str, str]:
    """Change the prompts' settings, and build them."""
    was, now = f"max_prompt_tokens: 64{old}}}", f"max_prompt_tokens: 64{new}}}"
    project.edit("config/config.yaml", was, now)
    return project.build("prompts/sums")


def test_what_is_superseded_goes_and_what_is_kept_comes_back(own: Project):
    assert seeded(own, "", ", seed: 1") == {"prompts/sums": "built"}
    assert "of prompts/sums" not in clean(own, "--kind", "cache")  # the branch has it
    own.commit()
    own.sh("dvc", "push", "-q", "prompts-sums")
    shown = clean(own, "--kind", "cache", "--kind", "remote")
    assert row(shown, "of prompts/sums").startswith("cache")
    assert "a commit has them" in shown  # what counts for a remote

    own.edit("config/config.yaml", "max_prompt", "keep: true, max_prompt")
    text = clean(own, *STORES, "--yes")
    assert "of prompts/sums" not in text and "freed" in text
    assert seeded(own, ", seed: 1", "") == {"prompts/sums": "restored"}

    own.edit("config/config.yaml", "keep: true, ", "")
    assert clean(own, *STORES, "--yes").count("of prompts/sums") == 2
    assert seeded(own, "", ", seed: 1") == {"prompts/sums": "built"}


def test_only_copies_of_what_is_current_stay(own: Project):
    shutil.rmtree(own.path / "artifacts/sft")
    clean(own, *STORES, "--kind", "work", "--yes")
    saves = own.path.glob("work/*/*/checkpoint-*")
    assert {save.parts[-3] for save in saves} == {"sft", "grpo"}  # are not current
    assert len([*own.path.glob("work/*/*/log.txt")]) == 10  # logs stay
    assert own.build() == {"sft/instruct": "restored"}
    clean(own, "--yes")
    assert not [*own.path.glob("work/*/*/checkpoint-*")]
    assert own.planned() == set() and own.dvc_clean()
    shutil.rmtree(own.path / ".dvc/cache/files")
    shutil.rmtree(own.path / "artifacts")
    own.sh("dvc", "pull", "-q")
    verify = "scripts.lib.lineage", "verify", "export/nano", "--strict"
    assert "all as recorded" in own.sh(sys.executable, "-m", *verify)


def test_a_stopped_or_running_nodes_folder_stays(project: Project):
    (saved,) = project.path.glob("work/grpo/reasoner-*/checkpoint-*")
    project.edit("dvc.lock", "weight_decay: 0.1", "weight_decay: 0.2")  # of grpo
    folder = str(saved.parent.relative_to(project.path))
    text = clean(project, "--node", "grpo/reasoner")
    assert "a run goes on from it" in row(text, folder)
    project.sh("git", "checkout", "-q", "dvc.lock")
    with open(project.path / "state/grpo/reasoner.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = clean(project, "--kind", "work", "--yes")
        assert folder not in text and saved.exists()
    with open(project.path / "state/run.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = clean(project, "--kind", "work", "--yes", check=False)
        assert project.code == 1 and "another build is running" in text
    assert saved.exists()
    assert "published" in row(clean(project, "--node", "grpo/reasoner"), folder)


def test_nodes_that_left_the_config_go_but_not_those_of_another(project: Project):
    config = project.path / "config/config.yaml"
    text = config.read_text()
    left = project.path / "artifacts/eval/sums"
    killed = project.path / "artifacts/eval/.old.trash"
    killed.mkdir()
    start, end = text.index("eval:"), text.index("report:")
    (project.path / "config/other.yaml").write_text(text)
    config.write_text(text[:start] + text[end:])
    said = clean(project, "--kind", "artifacts", "--yes")
    assert "another config" not in said and left.exists() and not killed.exists()
    (project.path / "config/other.yaml").unlink()
    project.commit()  # its dvc.yaml has no such stage, its dvc.lock has
    assert "of eval/sums" not in clean(project, "--kind", "cache")
    said = clean(project, "--kind", "artifacts", "--kind", "cache", "--refs", "none")
    assert "no such node now" in row(said, "artifacts/eval/sums")
    assert "of eval/sums" in said and left.exists()
    clean(project, "--kind", "artifacts", "--kind", "cache", "--refs", "none", "--yes")
    assert not left.exists()


def test_what_another_config_says_of_a_node_of_the_same_name_counts(project: Project):
    (old,) = project.path.glob("work/grpo/reasoner-*")
    folder = old.with_name("reasoner-0123456789ab")
    shutil.copytree(old, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(re.sub(r"steps: \d+", "steps: 77", recipe.read_text(), count=1))
    shown = str(folder.relative_to(project.path))
    of_node = "--node", "grpo/reasoner"
    assert "of other inputs than now" in row(clean(project, *of_node), shown)
    other = project.path / "config/longer.yml"
    other.write_text("extends: config.yaml\ngrpo: {reasoner: {steps: 77}}\n")
    assert "another config has a node like" in row(clean(project, *of_node), shown)
    other.write_text("extends: config.yaml\ngrpo: {reasoner: {keep: true}}\n")
    assert "keep: true" in row(clean(project, *of_node), shown)
    other.unlink()
    clean(project, *of_node, "--yes")
    assert not folder.exists()
