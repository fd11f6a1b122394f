"""A release is all that is uploaded: it loads, tells the truth, and is checked alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.workflow.conftest import Project
from tests.workflow.test_lineage import flip, lineage

CONFIG = """
release:
  nano:
    from: nano
    title: Nano
    license: apache-2.0
    language: en
    tags: [sums]
    limits: It adds.
"""
CHAT = "chat: {files: data/chat.jsonl"


@pytest.fixture(scope="module")
def released(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The built project, with a release of its export."""
    copy = tmp_path_factory.mktemp("released") / "project"
    subprocess.run(["cp", "-a", str(built.path), str(copy)], check=True)
    project = Project(copy)
    project.edit("config/config.yaml", "report:\n", f"{CONFIG[1:]}report:\n")
    project.edit("config/config.yaml", CHAT, f"{CHAT}, license: CC-BY | 4.0")
    assert project.build() == {"release/nano": "built"}
    assert "[done] to upload: artifacts/release/nano/model" in project.output
    return project


@pytest.fixture
def alone(released: Project, tmp_path: Path) -> Path:
    """A release's folder, as it would be downloaded: alone, elsewhere."""
    folder = tmp_path / "downloaded"
    shutil.copytree(released.path / "artifacts/release/nano/model", folder)
    return folder


def test_a_release_is_the_export_and_takes_no_place_of_its_own(released: Project):
    model = released.path / "artifacts/export/nano/model"
    for path in (p for p in model.rglob("*") if p.is_file()):
        other = released.path / "artifacts/release/nano/model" / path.relative_to(model)
        assert other.read_bytes() == path.read_bytes()
        assert path.samefile(other) or path.stat().st_mode & 0o222
    assert released.dvc_clean()


def test_a_release_alone_answers_a_chat_and_stops_at_its_end(alone: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(alone)
    words = AutoTokenizer.from_pretrained(alone)
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    asked = words.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = asked["input_ids"].shape[1]
    answer = model.generate(**asked)[0, prompt:]
    assert 0 < len(answer) <= model.generation_config.max_new_tokens == 64
    told = words.apply_chat_template(
        [*chat, {"role": "assistant", "content": "5"}], tokenize=False
    )
    end = words.convert_tokens_to_ids(told.partition("5")[2].strip())
    only = model.generate(**asked, prefix_allowed_tokens_fn=lambda *_: [end])
    assert only[0, prompt:].tolist() == [end], "it goes on after its end"
    assert words.model_max_length == model.config.max_position_embeddings == 512
    assert model.config.architectures and str(model.dtype) == "torch.float32"
    assert not {p.suffix for p in alone.iterdir()} & {".bin", ".pt", ".pkl"}


def test_the_card_is_of_the_hubs_form_and_has_the_scores(
    released: Project, alone: Path
):
    from huggingface_hub import ModelCard

    card = ModelCard.load(alone / "README.md")
    told = card.data
    assert (told.license, told.language, told.tags[0]) == ("apache-2.0", ["en"], "sums")
    assert told.library_name == "transformers" and told.model_name == "Nano"
    assert told.pipeline_tag == "text-generation"
    path = released.path / "artifacts/eval/sums/scores/scores.json"
    (score,) = (
        s for s in json.loads(path.read_text())["scores"] if s["model"] == "export/nano"
    )
    (result,) = told.eval_results
    assert result.metric_value == score["score"]
    assert result.metric_args["interval"] == score["interval"]
    assert result.dataset_args["num_items"] == score["num_items"]
    for line in (
        "| chat | fine-tuning | the builder's own files | CC-BY \\| 4.0 |  |",
        "| `sft/instruct` | SFT, all weights | 4 | 8 | 32 rows of up to 128 tokens |",
        "| `eval/sums` | arithmetic | **this** |",
        "It adds.",
        "- No licence is stated of: corpus, sums.",
        "None: trained from scratch, from `config/models/tiny/config.json`.",
    ):
        assert line in card.text
    rows = json.loads(lineage(released, "show", "export/nano", "--json"))["nodes"]
    for row in rows[:-1]:
        content = next(d for d in row["outs"].values() if d.endswith(".dir"))
        assert f"| `{row['node']}` | {content[:8]} |" in card.text


def test_a_changed_licence_reruns_the_release_only(released: Project):
    export = lineage(released, "verify", "export/nano")
    released.edit("config/config.yaml", "CC-BY | 4.0", "MIT")
    released.edit("config/config.yaml", "apache-2.0", "mit")
    assert released.build() == {"release/nano": "built"}
    assert "license apache-2.0 -> mit" in released.output
    assert lineage(released, "verify", "export/nano") == export
    released.edit("config/config.yaml", "MIT", "CC-BY | 4.0")
    released.edit("config/config.yaml", "license: mit", "license: apache-2.0")
    assert released.build() == {"release/nano": "restored"}


def test_a_release_alone_is_verified_to_the_last_byte(released: Project, alone: Path):
    assert "all as recorded" in lineage(released, "verify", str(alone), "--strict")
    assert "all as recorded" in lineage(released, "verify", "release/nano")
    command = "grep -oE '[0-9a-f]{32}  [^\"]+' provenance.json | md5sum -c"
    assert command in (alone / "README.md").read_text()
    subprocess.run(["sh", "-c", command], cwd=alone, check=True, capture_output=True)
    shown = json.loads(lineage(released, "show", str(alone), "--json"))["nodes"]
    assert [row["node"] for row in shown[-3:]] == [
        "export/nano", "eval/sums", "release/nano",
    ]  # fmt: skip
    (alone / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert "all as recorded" in lineage(released, "verify", str(alone))
    for name in ("model.safetensors", "README.md", "provenance.json"):
        flip(alone / name)
        assert f"{name}: changed" in lineage(released, "verify", str(alone), fails=True)
        flip(alone / name)
