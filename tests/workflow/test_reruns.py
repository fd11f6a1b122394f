"""What reruns, and what does not: each on the real Snakemake and the real DVC."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.workflow.conftest import TRAINING, Project

RL_ON = {"grpo/reasoner", "export/nano", "eval/sums", "report/main"}
SFT_ON = {"sft/instruct", *RL_ON}


def assert_current(project: Project) -> None:
    """Snakemake, DVC's status and DVC's own plan all say: nothing to do."""
    assert project.planned() == set()
    assert project.dvc_clean(), project.output
    assert project.dvc_would_run() == set()


def set_lr(project: Project, old: str, new: str) -> None:
    project.edit("config/config.yaml", f"lr: {old}", f"lr: {new}")


def test_first_build_makes_every_node_and_leaves_nothing_to_do(built: Project):
    assert set(built.first) == {
        "tokenizer/tiny", "tokenize/corpus", "pack/chat", "prompts/sums",
        "pretrain/base", "sft/instruct", "grpo/reasoner", "export/nano", "eval/sums",
        "report/main",
    }  # fmt: skip
    assert set(built.first.values()) == {"built"}
    assert_current(built)
    assert "[done] model: artifacts/export/nano/model" in built.snakemake("export")
    for node in built.first:
        provenance = json.loads(
            (built.path / "artifacts" / node / "provenance.json").read_text()
        )
        assert provenance["node"] == node and provenance["seconds"] > 0


def test_touched_files_rerun_nothing(project: Project):
    for when in ("now", "3 years ago"):
        project.sh(
            "sh", "-c",
            f"find . -name .git -prune -o -type f -exec touch -d '{when}' {{}} +",
        )  # fmt: skip
        assert_current(project)


def test_placement_profile_and_cores_rerun_nothing(project: Project):
    project.edit("config/config.yaml", "cpus: 1", "cpus: 2")
    project.edit("local/config.yaml", "cores: all", "cores: 1")
    assert_current(project)


def test_comments_docstrings_and_formatting_rerun_nothing(project: Project):
    project.edit("scripts/transformers/sft.py", '"""', '"""Reworded. ')
    text = (project.path / "scripts/transformers/common.py").read_text()
    (project.path / "scripts/transformers/common.py").write_text(
        "# a comment\n" + text.replace("\n\n\n", "\n\n\n\n")
    )
    assert_current(project)


def test_a_clone_reruns_nothing_after_a_full_a_partial_and_no_pull(clone: Project):
    assert clone.planned() == set()
    assert clone.dvc_would_run() == set()
    clone.sh("dvc", "pull", "-q", "export-nano")
    assert clone.planned() == set()
    assert clone.dvc_would_run() == set()
    clone.sh("dvc", "pull", "-q")
    assert_current(clone)


def test_grpo_lr_reruns_that_node_and_its_descendants(project: Project):
    set_lr(project, "1.0e-5", "2.0e-5")
    assert "lr 1.0e-5 -> 2.0e-5" in project.reason("grpo/reasoner")
    assert project.planned() == RL_ON
    assert set(project.build()) == RL_ON
    assert_current(project)


def test_grpo_lr_in_a_clone_fetches_only_what_it_reads(clone: Project):
    set_lr(clone, "1.0e-5", "2.0e-5")
    assert clone.build("grpo") == {"grpo/reasoner": "built"}
    here = {p.parent.name for p in clone.path.glob("artifacts/*/*") if p.is_dir()}
    assert here == {"sft", "prompts", "grpo"}


EDITS = [
    # file, old, new, what must be planned
    ("config/config.yaml", "cpus: 1", "cpus: 2", set()),
    ("scripts/transformers/sft.py", '"""', '"""Reworded. ', set()),
    ("config/config.yaml", "lr: 1.0e-5", "lr: 2.0e-5", RL_ON),
    ("scripts/transformers/sft.py", "NOT_COUNTED = ", "OTHER = NOT_COUNTED = ", SFT_ON),
    ("data/chat.jsonl", "\n", "\n\n", {"pack/chat", *SFT_ON}),
    ("config/config.yaml", "limit: 20", "limit: 19", {"eval/sums", "report/main"}),
]


@pytest.mark.parametrize("pulled", ["nothing", "export-nano", "everything"])
def test_a_clone_plans_the_same_whatever_was_pulled(clone: Project, pulled: str):
    if pulled != "nothing":
        clone.sh("dvc", "pull", "-q", *([pulled] if pulled != "everything" else []))
    for file, old, new, planned in EDITS:
        clone.edit(file, old, new)
        assert clone.planned() == planned, (file, new)
        dvc = clone.dvc_would_run()
        assert dvc <= planned and bool(dvc) == bool(planned), (file, new)
        clone.sh("git", "checkout", "-q", "--", ".")
    assert clone.planned() == set()


def test_a_setting_changed_and_back_is_restored_not_trained(project: Project):
    before = project.lock()
    set_lr(project, "1.0e-5", "2.0e-5")
    budget = "budget: {cpu_hours: 0}\n"
    project.edit("config/config.yaml", "placement:", f"{budget}placement:")
    assert project.build("grpo", check=False) == {}
    assert project.code and "budget.cpu_hours: 0 core-hours" in project.output
    project.edit("config/config.yaml", budget, "")
    project.build("grpo")
    project.edit("config/config.yaml", "placement:", f"{budget}placement:")
    after = project.reason("export/nano")
    assert "grpo/reasoner changed <- lr 1.0e-5 -> 2.0e-5 (config/config.yaml:" in after
    set_lr(project, "2.0e-5", "1.0e-5")
    assert project.reason("grpo/reasoner").startswith("restore ")
    assert project.reason("export/nano").startswith("current ")
    assert project.build("grpo") == {"grpo/reasoner": "restored"}  # it costs nothing
    project.edit("config/config.yaml", budget, "")
    assert_current(project)
    assert project.lock() == before


def test_a_chat_reruns_pack_and_its_sft_not_tokenize_nor_pretrain(project: Project):
    rows = project.rows("data/chat.jsonl")
    project.write_rows("data/chat.jsonl", [*rows, rows[0]])
    assert set(project.build()) == {"pack/chat", *SFT_ON}
    assert_current(project)


def test_a_document_reruns_tokenize_on(project: Project):
    rows = project.rows("data/corpus.jsonl")
    project.write_rows("data/corpus.jsonl", [*rows, rows[0]])
    assert "data/corpus.jsonl changed" in project.reason("tokenize/corpus")
    done = project.build("sft")
    assert {"tokenize/corpus", "pretrain/base", "sft/instruct"} <= set(done)


def test_of_several_files_only_one_that_is_new_or_changed_is_tokenized(
    project: Project, tmp_path: Path
):
    rows = project.rows("data/corpus.jsonl")
    os.remove(project.path / "data/corpus.jsonl")
    for name in "123":
        project.write_rows(f"data/corpus-{name}.jsonl", rows[int(name) :: 3])
    project.edit("config/config.yaml", "data/corpus.jsonl", "data/corpus-*.jsonl")
    project.edit("config/config.yaml", "    data: corpus\n", "    data: chat\n")
    project.build("tokenize")

    project.write_rows("data/corpus-2.jsonl", [*rows[2::3], "no row"])
    project.snakemake("tokenize", check=False)
    assert project.code and "corpus-2.jsonl:" in project.output
    project.write_rows("data/corpus-2.jsonl", [*rows[2::3], rows[0]])
    project.write_rows("data/corpus-0.jsonl", rows[:5])
    assert project.build("tokenize") == {"tokenize/corpus": "built"}
    assert said(project, "2 of 4 chunks as before")
    assert_same_as_fresh(project, tmp_path)

    project.commit()
    project.sh("dvc", "push", "-q", "tokenize-corpus", "tokenizer-tiny")
    path = tmp_path / "clone"
    project.sh("git", "clone", "-q", str(project.path), str(path))
    clone = Project(path)
    clone.sh("dvc", "pull", "-q", "tokenize-corpus", "tokenizer-tiny")
    clone.write_rows("data/corpus-9.jsonl", rows[:9])
    assert clone.build("tokenize") == {"tokenize/corpus": "built"}
    assert said(clone, "4 of 5 chunks as before")
    assert_same_as_fresh(clone, path)


def said(project: Project, what: str) -> bool:
    return what in (project.path / "logs/tokenize/corpus.log").read_text()


def assert_same_as_fresh(project: Project, tmp_path: Path) -> None:
    """The published tokens are those of the script alone, from the start."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    words = ["--tokenizer", "artifacts/tokenizer/tiny/model", "--recipe", str(recipe)]
    for file in sorted(project.path.glob("data/corpus-*.jsonl")):
        words += ["--data", f"corpus={file}"]
    fresh = tmp_path / "fresh"
    words += ["--out", str(fresh)]
    project.sh(sys.executable, "-m", "scripts.data.tokenize", *words)
    published = project.path / "artifacts/tokenize/corpus"
    for name in ("corpus.bin", "corpus.idx", "blend.json"):
        assert (published / "data" / name).read_bytes() == (fresh / name).read_bytes()
    receipts = (published / "receipts.json").read_text()
    assert receipts == (fresh / "receipts.json").read_text()


def test_equal_bytes_stop_the_run_and_queue_no_training(project: Project):
    # a blank line more: other bytes in, the same tokenizer and tokens out
    with open(project.path / "data/corpus.jsonl", "a") as file:
        file.write("\n")
    done = project.build()
    assert set(done) == {"tokenizer/tiny", "tokenize/corpus"}
    assert_current(project)


def test_a_helper_reruns_the_stages_that_import_it(project: Project):
    project.edit("scripts/lib/indexed.py", "\nimport ", "\nUNUSED = 1\nimport ")
    planned = project.planned()
    assert {"tokenize/corpus", "pretrain/base"} <= planned
    assert "scripts/lib/indexed.py changed" in project.reason("tokenize/corpus")
    assert not planned & {"tokenizer/tiny", "pack/chat", "prompts/sums"}
    assert "tokenize/corpus" in project.build("tokenize")


def test_a_pinned_version_reruns_the_stages_that_use_it(project: Project):
    # the record says another version than the lock: as after a teammate's bump
    text = project.lock()
    assert "trl: 1.16.0" in text
    (project.path / "dvc.lock").write_text(text.replace("trl: 1.16.0", "trl: 1.15.0"))
    assert project.planned() == SFT_ON
    assert "trl 1.15.0 -> 1.16.0" in project.reason("sft/instruct")


def test_an_environment_that_is_not_the_lock_is_refused(project: Project):
    project.edit("envs/transformers.lock", "trl==1.16.0", "trl==1.15.0")
    text = project.snakemake("-n", "export", check=False)
    assert project.code and "pinned at 1.15.0, but here it is 1.16.0" in text
    assert "make env" in text


def test_eval_tasks_rerun_eval_and_report(project: Project):
    task = project.path / "config/tasks/arithmetic.yaml"
    task.write_text(task.read_text() + "\nmetadata: {version: 2.0}\n")
    assert project.planned() == {"eval/sums", "report/main"}


@pytest.mark.parametrize("harm", ["deleted", "truncated", "edited"])
def test_a_harmed_artifact_is_named_and_restored(project: Project, harm: str):
    folder = project.path / "artifacts/sft/instruct"
    weights = folder / "model/model.safetensors"
    if harm == "deleted":
        shutil.rmtree(folder)
    elif harm == "truncated":
        os.truncate(weights, 1000)
    else:
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        with open(weights, "r+b") as file:
            file.write(content)
    reason = project.reason("sft/instruct")
    assert reason.startswith("restore") and "artifacts/sft/instruct" in reason
    assert project.build() == {"sft/instruct": "restored"}
    assert_current(project)


def test_a_harmed_artifact_in_no_cache_and_no_remote_is_rebuilt(project: Project):
    project.sh("dvc", "remote", "remove", "store")
    shutil.rmtree(project.path / "artifacts/export/nano")
    shutil.rmtree(project.path / ".dvc/cache/files")
    assert "no cache and no remote" in project.reason("export/nano")
    done = project.build()
    assert done["export/nano"] == "built"
    assert not set(done) & TRAINING


def test_a_clone_without_a_remote_rebuilds_what_it_needs_and_says_so(clone: Project):
    clone.sh("dvc", "remote", "remove", "store")
    assert "no cache and no remote" in clone.reason("export/nano")
    assert "no cache and no remote" in clone.reason("pretrain/base")


def test_dvc_repro_builds_what_snakemake_would(project: Project):
    set_lr(project, "1.0e-5", "3.0e-5")
    assert "modified" in project.sh("dvc", "status")
    project.sh("dvc", "repro", "-q")
    assert_current(project)


def test_dvc_repro_sees_code_without_snakemake(project: Project):
    project.edit("scripts/eval.py", "\nimport ", "\nUNUSED = 1\nimport ")
    project.sh("dvc", "repro", "-q", "eval-sums")
    assert project.planned() <= {"report/main"}


def test_a_build_killed_hard_continues_without_unlocking(project: Project):
    set_lr(project, "1.0e-5", "4.0e-5")
    run = project.start_grpo()
    os.killpg(run.pid, 9)
    run.wait()
    assert project.build("grpo") == {"grpo/reasoner": "built"}
    assert project.planned("grpo") == set()


def test_an_orphaned_job_is_waited_for_and_not_doubled(project: Project):
    set_lr(project, "1.0e-5", "5.0e-5")
    run = project.start_grpo()
    run.kill()  # the controller alone: its job lives on
    run.wait()
    text = project.snakemake("grpo")
    assert "waits for the process" in text
    assert "grpo/reasoner  restored" in text
    assert project.planned("grpo") == set()


def test_a_second_build_at_the_same_time_is_refused(project: Project):
    set_lr(project, "1.0e-5", "6.0e-5")
    first = project.start_grpo()
    text = project.snakemake("grpo", check=False)
    assert project.code and "another build is running" in text
    _, rest = first.communicate()
    assert first.returncode == 0, rest
    assert project.planned("grpo") == set()
