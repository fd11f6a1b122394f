"""What goes wrong says so, before training where it can, and loses nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tests.workflow.conftest import Project, make_project


def outs(project: Project) -> dict[str, str]:
    """{published content: digest} as dvc.lock has it."""
    from scripts.lib.store import load_yaml

    stages = load_yaml(project.path / "dvc.lock")["stages"]
    return {
        out["path"]: out["md5"]
        for stage in stages.values()
        for out in stage["outs"]
        if out["path"].startswith("artifacts/")
        and not out["path"].endswith(("provenance.json", "page"))  # they tell the time
    }


def test_the_same_config_gives_the_same_bytes_in_another_folder(
    built: Project, tmp_path: Path
):
    other = make_project(tmp_path / "another" / "place")
    other.build()
    assert outs(other) == outs(built)


def test_a_bad_chat_stops_the_build_before_training(project: Project):
    rows = project.rows("data/chat.jsonl")
    bad = json.dumps({"messages": [{"role": "user", "content": "1+1"}]})
    project.write_rows("data/chat.jsonl", [*rows, bad])
    project.edit("config/config.yaml", "steps: 4", "steps: 5")  # pretrain is stale too
    before = outs(project)
    text = project.snakemake("export", check=False)
    assert project.code
    assert f"data/chat.jsonl:{len(rows) + 1}" in text and "assistant" in text
    assert "pretrain/base  starts" not in text
    assert (
        outs(project).items()
        >= {k: v for k, v in before.items() if "tokenize" not in k}.items()
    )


def test_a_truncated_archive_is_named(project: Project):
    plain = project.path / "data/chat.jsonl"
    packed = gzip.compress(plain.read_bytes())
    (project.path / "data/chat.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    project.edit(
        "config/config.yaml", "files: data/chat.jsonl", "files: data/chat.jsonl.gz"
    )
    text = project.snakemake("pack", check=False)
    assert project.code and "data/chat.jsonl.gz" in text and "cut short" in text


def test_a_diverging_run_publishes_nothing_and_names_the_step(project: Project):
    before = (project.path / "dvc.lock").read_text()
    weights = project.path / "artifacts/sft/instruct/model/model.safetensors"
    content = weights.read_bytes()
    project.edit(
        "config/config.yaml",
        "sft:\n  instruct: {from: base, data: chat, steps: 4, batch_size: 8, lr: 3.0e-3}",
        "sft:\n  instruct: {from: base, data: chat, steps: 9, batch_size: 8, lr: 1.0e+30}",
    )
    text = project.snakemake("sft", check=False)
    assert project.code and "the loss is" in text and ": step " in text
    assert weights.read_bytes() == content
    recorded = (project.path / "dvc.lock").read_text()
    assert recorded.split("sft-instruct")[1] == before.split("sft-instruct")[1]


def test_a_merge_conflict_in_the_lock_is_named(project: Project):
    lock = project.path / "dvc.lock"
    lock.write_text("<<<<<<< HEAD\n" + lock.read_text())
    text = project.snakemake("-n", "export", check=False)
    assert project.code and "dvc.lock" in text and "merge" in text


def test_a_config_mistake_stops_before_anything_is_queued(project: Project):
    project.edit(
        "config/config.yaml", "from: base, data: chat", "form: base, data: chat"
    )
    text = project.snakemake("export", check=False)
    assert project.code and "did you mean `from`?" in text
    assert "starts" not in text and "Traceback" not in text


def test_code_edited_during_a_build_is_not_what_runs(project: Project):
    project.edit("config/config.yaml", "lr: 1.0e-5", "lr: 2.0e-5")
    run = project.start_grpo()
    script = project.path / "scripts/transformers/grpo.py"
    text = script.read_text()
    script.write_text("raise SystemExit('this was not planned')\n" + text)
    _, said = run.communicate()
    assert run.returncode == 0, said
    assert "scripts/transformers/grpo.py changed" in project.reason("grpo/reasoner")
    script.write_text(text)
    assert project.planned("grpo") == set()


def test_a_remote_that_does_not_answer_starts_no_training(clone: Project):
    clone.sh("dvc", "remote", "modify", "store", "url", "s3://nowhere/at/all")
    text = clone.snakemake("export", check=False)
    assert clone.code and "does not say whether it has them" in text
    assert "starts" not in text


def test_raw_data_in_dvc_is_pulled_when_it_is_read(project: Project, tmp_path: Path):
    project.sh("git", "rm", "-q", "--cached", "data/sums.jsonl")
    project.sh("dvc", "add", "-q", "data/sums.jsonl")
    assert project.planned() == set()
    project.commit()
    project.sh("dvc", "push", "-q")
    path = tmp_path / "clone"
    project.sh("git", "clone", "-q", str(project.path), str(path))
    clone = Project(path)
    assert clone.planned() == set()
    clone.edit("config/config.yaml", "max_prompt_tokens: 64", "max_prompt_tokens: 63")
    assert clone.build("prompts") == {"prompts/sums": "built"}


def test_more_than_one_config_is_refused(project: Project):
    text = project.sh("snakemake", "-n", "export", "--config", "seed=1", check=False)
    assert project.code and "one file says it all" in text
