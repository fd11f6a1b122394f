"""Where a model comes from, whether that is still so, and how two of them differ."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflow.conftest import ROOT, Project

ABOVE = {
    "tokenizer/tiny", "tokenize/corpus", "pack/chat", "prompts/sums", "pretrain/base",
    "sft/instruct", "grpo/reasoner",
}  # fmt: skip
WEIGHTS = "artifacts/pretrain/base/model/model.safetensors"
WIDTH = 100
README = (ROOT / "README.md").read_text()


def lineage(project: Project, *words: str, fails: bool = False) -> str:
    text = project.sh(sys.executable, "-m", "scripts.lib.lineage", *words, check=False)
    assert bool(project.code) == fails, text
    return text


def flip(path: Path) -> None:
    """Change one byte of a file, but of none that shares its place on the disk."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def cached(project: Project, path: str) -> Path:
    """Where DVC's cache has a file of the project."""
    from scripts.lib.digest import md5_file

    md5 = md5_file(project.path / path)
    return project.path / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def test_a_lineage_names_every_ancestor_with_what_it_was_made_of(built: Project):
    found = json.loads(lineage(built, "show", "export/nano", "--json"))
    rows = {row["node"]: row for row in found["nodes"]}
    assert set(rows) == {*ABOVE, "export/nano"} and found["node"] == "export/nano"
    ids = list(rows)
    for id, row in rows.items():
        made = row["made"]
        assert made["host"] and made["seconds"] > 0 and made["gpu_hours"] == 0, id
        assert made["cpu_hours"] >= 0, id
        assert made["environment"]["envs/transformers.lock"], id
        assert row["code"] and row["packages"] and row["outs"], id
        for path, md5 in row["inputs"].items():
            if path.startswith("artifacts/"):
                parent = "/".join(path.split("/")[1:3])
                assert ids.index(parent) < ids.index(id)
                assert rows[parent]["outs"][path] == md5
    base = rows["pretrain/base"]
    assert base["tokens"] == 4 * 8 * 64 and base["seed"] == 17
    assert rows["pack/chat"]["counts"]["chats"] == 300
    assert "data/chat.jsonl" in rows["pack/chat"]["inputs"]


def test_the_text_fits_a_terminal_and_the_drawing_names_every_node(
    built: Project, tmp_path: Path
):
    drawing = tmp_path / "lineage.svg"
    text = lineage(built, "show", "export/nano", "--svg", str(drawing))
    assert max(map(len, text.replace(str(drawing), "").splitlines())) <= WIDTH
    for id in ABOVE:
        assert id in text and id.split("/")[1] in drawing.read_text()


def test_without_the_artifacts_the_cache_tells_and_is_verified(project: Project):
    shutil.rmtree(project.path / "artifacts")
    found = json.loads(lineage(project, "show", "export/nano", "--json"))
    assert all(row["made"] for row in found["nodes"])
    assert "all as recorded" in lineage(project, "verify", "export/nano", "--strict")


def test_one_byte_of_an_ancestors_artifact_is_found(project: Project):
    assert "all as recorded" in lineage(project, "verify", "export/nano", "--strict")
    flip(project.path / WEIGHTS)
    (project.path / "artifacts/pack/chat/data/more.txt").write_text("")
    (project.path / "artifacts/sft/instruct/model/config.json").unlink()
    text = lineage(project, "verify", "export/nano", fails=True)
    assert f"{WEIGHTS}: changed" in text
    assert "artifacts/pack/chat/data/more.txt: not recorded" in text
    assert "artifacts/sft/instruct/model/config.json: missing" in text
    assert ": 3 wrong" in text
    assert ": 1 wrong" in lineage(project, "verify", "pretrain/base", fails=True)


def test_one_byte_of_a_cached_object_is_found(project: Project):
    one = cached(project, WEIGHTS)
    flip(one)
    text = lineage(project, "verify", "export/nano", fails=True)
    assert f"{one.relative_to(project.path)}: changed" in text and WEIGHTS in text
    (project.path / WEIGHTS).unlink()
    shutil.rmtree(project.path / "artifacts/pretrain/base/model")
    assert WEIGHTS in lineage(project, "verify", "export/nano", fails=True)


def test_one_byte_of_a_cached_listing_is_found(project: Project):
    listings = sorted((project.path / ".dvc/cache/files/md5").glob("*/*.dir"))
    for listing in listings:
        flip(listing)
    text = lineage(project, "verify", "export/nano", fails=True)
    assert text.count(": changed: it lists ") == len(ABOVE) + 1


def test_one_byte_of_a_source_the_code_and_a_setting_are_found(project: Project):
    flip(project.path / "data/chat.jsonl")
    project.edit("scripts/data/pack.py", "import json", "import glob\nimport json")
    project.edit("config/config.yaml", "lr: 1.0e-5", "lr: 2.0e-5")
    text = lineage(project, "verify", "export/nano", fails=True)
    assert "data/chat.jsonl: changed" in text
    assert "scripts/data/pack.py: changed since pack/chat was made" in text
    assert "grpo/reasoner: lr 1.0e-5 -> 2.0e-5 since it was made" in text
    assert ": 3 wrong" in text


def test_a_changed_record_is_found(project: Project):
    project.edit("dvc.lock", "weight_decay: 0.1", "weight_decay: 0.2")
    text = lineage(project, "verify", "export/nano", fails=True)
    assert "dvc.lock: recipe of grpo/reasoner" in text


def test_a_clone_verifies_after_a_pull_and_says_what_is_not_here(clone: Project):
    text = lineage(clone, "verify", "export/nano", fails=True)
    assert "pretrain/base: metrics.jsonl, model, provenance.json: neither here" in text
    assert "wrong      export/nano: model, provenance.json: neither here" in text
    clone.sh("dvc", "pull", "-q", "export-nano")
    text = lineage(clone, "verify", "export/nano")
    assert "dvc pull pretrain-base" in text and "unchecked" in text
    lineage(clone, "verify", "export/nano", "--strict", fails=True)
    clone.sh("dvc", "pull", "-q")
    assert "all as recorded" in lineage(clone, "verify", "export/nano", "--strict")


@pytest.fixture
def copied(built: Project, tmp_path: Path) -> Path:
    """An export's folder, alone, elsewhere."""
    folder = tmp_path / "release"
    shutil.copytree(built.path / "artifacts/export/nano", folder)
    return folder


def test_an_exports_folder_alone_tells_its_lineage_and_verifies(
    built: Project, copied: Path
):
    assert "all as recorded" in lineage(built, "verify", str(copied), "--strict")
    assert "all as recorded" in lineage(built, "verify", str(copied / "model"))
    alone = json.loads(lineage(built, "show", str(copied), "--json"))
    whole = json.loads(lineage(built, "show", "export/nano", "--json"))
    assert alone["nodes"][:-1] == whole["nodes"][:-1]
    own, recorded = alone["nodes"][-1], whole["nodes"][-1]
    assert own["outs"].items() <= recorded["outs"].items()
    assert {**own, "outs": 0} == {**recorded, "outs": 0}


def test_without_this_project_md5sum_verifies_it(copied: Path):
    (command,) = re.findall(r"(?m)^grep .*provenance\.json.*$", README)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", command], cwd=copied, text=True, capture_output=True
        )

    files = [p for p in copied.rglob("*") if p.is_file()]
    assert run().returncode == 0 and run().stdout.count(": OK") == len(files) - 1
    flip(copied / "model/model.safetensors")
    assert run().returncode == 1 and "model/model.safetensors: FAILED" in run().stdout


def test_any_byte_changed_in_a_copied_folder_is_found(built: Project, copied: Path):
    for path in sorted(p for p in copied.rglob("*") if p.is_file()):
        name = path.relative_to(copied).as_posix()
        before = path.read_bytes()
        flip(path)
        text = lineage(built, "verify", str(copied), fails=True)
        assert name in text
        path.write_bytes(before)
    (copied / "model/extra.py").write_text("")
    (copied / "model/parity.json").unlink()
    (copied / "model/away").symlink_to("/etc")
    text = lineage(built, "verify", str(copied), fails=True)
    assert "model/extra.py: not recorded" in text and ": 3 wrong" in text
    assert "model/parity.json: missing" in text and "model/away: is no plain" in text
    shutil.rmtree(copied / "model/away", ignore_errors=True)
    (copied / "provenance.json").unlink()
    assert "has no provenance.json" in lineage(
        built, "verify", str(copied / "model"), fails=True
    )


def test_a_commit_and_a_host_do_not_change_what_is_published(project: Project):
    """Or all that reads the model would run again."""
    before = (project.path / "artifacts/export/nano/provenance.json").read_bytes()
    model = project.sh("sh", "-c", "md5sum artifacts/export/nano/model/*")
    project.edit(
        "scripts/transformers/export.py", "import os", "import glob\nimport os"
    )
    project.commit()
    assert set(project.build()) == {"export/nano"}
    assert project.sh("sh", "-c", "md5sum artifacts/export/nano/model/*") == model
    assert (
        project.path / "artifacts/export/nano/provenance.json"
    ).read_bytes() != before
    assert "all as recorded" in lineage(project, "verify", "export/nano", "--strict")


def test_an_export_made_in_a_clone_carries_what_only_the_remote_has(clone: Project):
    clone.edit("scripts/transformers/export.py", "import os", "import glob\nimport os")
    assert set(clone.build("export/nano")) == {"export/nano"}
    rows = json.loads(lineage(clone, "show", "artifacts/export/nano", "--json"))[
        "nodes"
    ]
    assert all(row["made"] for row in rows)
    base = next(row for row in rows if row["node"] == "pretrain/base")
    assert base["tokens"] and not (clone.path / "artifacts/pretrain").exists()


def test_two_branches_differ_by_their_settings_scores_and_metrics(project: Project):
    project.sh("git", "checkout", "-q", "-b", "other")
    project.edit("config/config.yaml", "steps: 2", "steps: 3")
    project.edit("config/config.yaml", "lr: 1.0e-5", "lr: 1.0e-2")
    project.build()
    project.commit()
    text = lineage(project, "diff", "main:export/nano", "other:export/nano")
    assert re.search(r"settings +steps 2 -> 3  \(grpo/reasoner\)", text)
    assert "lr 1.0e-5 -> 0.01  (grpo/reasoner)" in text
    assert re.search(r"models +content \w+ -> \w+  \(grpo/reasoner\)", text)
    assert re.search(r"data +the same", text) and re.search(r"code +the same", text)
    assert re.search(r"scores +eval/sums arithmetic  [\d.]+% \([\d.]+-[\d.]+\)", text)
    assert re.search(r"metrics +grpo/reasoner  step 2 -> 3", text)
    found = json.loads(
        lineage(project, "diff", "main:sft/instruct", "sft/instruct", "--json")
    )
    assert not any(
        found[key] for key in ("settings", "data", "models", "code", "metrics")
    )


def test_revisions_differ_by_their_data_and_code(project: Project):
    project.write_rows("data/chat.jsonl", project.rows("data/chat.jsonl")[:-1])
    project.edit("scripts/data/pack.py", "import json", "import glob\nimport json")
    project.build("pack/chat")
    project.commit()
    text = lineage(project, "diff", "HEAD~1:pack/chat", "HEAD:pack/chat")
    assert re.search(r"data +data/chat.jsonl \w{8} -> \w{8}  \(pack/chat\)", text)
    assert "chats 300 -> 299" in text
    assert re.search(r"code +scripts/data/pack.py \w{8} -> \w{8}  \(pack/chat\)", text)
    assert re.search(r"settings +the same", text)
    assert re.search(r"environment +commit \w+\+? -> \w+\+?", text)
    same = lineage(project, "diff", "HEAD:grpo/reasoner", "grpo/reasoner")
    assert same.count("the same") == 6


def test_a_node_that_is_only_planned_differs_by_its_settings(project: Project):
    project.edit(
        "config/config.yaml",
        "export:\n",
        "  other:\n    from: instruct\n    data: sums\n    steps: 2\n    batch_size: 8\n"
        "    num_generations: 4\n    max_completion_tokens: 4\n    lr: 3.0e-5\n"
        "    weight_decay: 0.1\nexport:\n",
    )
    project.reason("grpo/other")
    text = lineage(project, "diff", "grpo/reasoner", "grpo/other")
    assert re.search(
        r"settings +lr 1.0e-5 -> 3.0e-5  \(grpo/reasoner \| grpo/other\)", text
    )
    assert "-> never built" in text and re.search(r"code +the same", text)


def test_unknown_nodes_and_revisions_are_named(built: Project):
    text = lineage(built, "diff", "export/nana", "export/nano", fails=True)
    assert "no such node" in text and "did you mean `export/nano`" in text
    assert "no such revision" in lineage(
        built, "diff", "--", "--output=x:export/nano", "export/nano", fails=True
    )
    assert "did you mean" in lineage(built, "show", "exports/nano", fails=True)
    assert "did you mean" in lineage(built, "verify", "exports/nano", fails=True)
